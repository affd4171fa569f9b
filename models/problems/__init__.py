"""Training problems to measure optimizers on, small enough for two cores, by name.

problem = build("digits_mlp-full-nesterov", seed=0, rank=hvd.rank(), ranks=hvd.size())
model = problem.make_model()
optimizer = problem.make_optimizer(model)
for step in range(problem.steps):
    problem.loss(model, step).backward()
    ...
problem.metrics(model)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from models.problems.base import Problem
from models.problems.burgers2d import Burgers2d
from models.problems.digits_mlp import DigitsMLP

PROBLEMS: dict[str, Callable[..., Problem]] = {
    **{
        f"digits_mlp-{batch or 'full'}-{optimizer}": partial(
            DigitsMLP, batch=batch, optimizer=optimizer
        )
        for batch in (None, 500, 100)
        for optimizer in ("sgd", "nesterov", "adam")
    },
    "digits_mlp-32-nesterov": partial(DigitsMLP, batch=32, optimizer="nesterov", lr=0.2, steps=800),
    "burgers2d": Burgers2d,
}
"""Makers of problems, called with `seed`, `rank` and `ranks`; the family stands before the "-"."""


def build(name: str, *, seed: int = 0, rank: int = 0, ranks: int = 1) -> Problem:
    """Makes the problem called `name`, one of `PROBLEMS`."""
    problem = PROBLEMS[name](seed=seed, rank=rank, ranks=ranks)
    problem.name = name
    return problem


__all__ = ["PROBLEMS", "Problem", "build"]
