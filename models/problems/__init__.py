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
from typing import Any

from models.problems.admissions import Admissions
from models.problems.base import Problem
from models.problems.burgers2d import Burgers2d
from models.problems.burgers100d import Burgers100d
from models.problems.digits_mlp import DigitsMLP
from models.problems.digits_resnet import SMALL_BATCH, DigitsResNet
from models.problems.logistic import LogisticCancer, LogisticDigits
from models.problems.quadratic import Quadratic

PROBLEMS: dict[str, Callable[..., Problem]] = {
    "quadratic": Quadratic,
    "logistic_cancer-sgd": partial(LogisticCancer, optimizer="sgd"),
    "logistic_cancer-nesterov": partial(LogisticCancer, optimizer="nesterov"),
    "logistic_digits": LogisticDigits,
    **{
        f"digits_mlp-{batch or 'full'}-{optimizer}": partial(
            DigitsMLP, batch=batch, optimizer=optimizer
        )
        for batch in (None, 500, 100)
        for optimizer in ("sgd", "nesterov", "adam", "neumann")
    },
    "digits_mlp-32-nesterov": partial(DigitsMLP, batch=32, optimizer="nesterov", lr=0.2, steps=800),
    f"digits_resnet-{SMALL_BATCH}": partial(DigitsResNet, batch=SMALL_BATCH),
    "digits_resnet-full": DigitsResNet,
    "admissions": Admissions,
    "burgers2d": Burgers2d,
    "burgers2d-relu": partial(Burgers2d, activation="relu"),
    "burgers100d": Burgers100d,
}
"""Constructors by name, called with `seed`, `rank`, `ranks` and options. "-" ends the family."""


def build(name: str, *, seed: int = 0, rank: int = 0, ranks: int = 1, **options: Any) -> Problem:
    """Makes the problem called `name`, one of `PROBLEMS`.

    Args:
        name: one of `PROBLEMS`.
        seed: seed of weights, split and batches.
        rank: this rank.
        ranks: number of ranks.
        options: the problem's own, such as `steps`; "admissions" must have `csv`, a path.
    """
    problem = PROBLEMS[name](seed=seed, rank=rank, ranks=ranks, **options)
    problem.name = name
    return problem


__all__ = ["PROBLEMS", "Problem", "build"]
