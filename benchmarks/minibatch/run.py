"""One training with its measurements, and the least f that L-BFGS finds."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from aadl_hvd import AndersonConfig, AndersonOptimizer
from benchmarks.minibatch.averages import NAMES, Averages
from benchmarks.minibatch.bases import Base
from benchmarks.minibatch.problems import Problem

EVERY = 10
"""Steps from one evaluation to the next."""
LAST = 5
"""Number of last evaluations whose mean is the result of a training."""
Run = dict[str, Any]


def train(
    problem: Problem,
    base: Base,
    config: AndersonConfig | None = None,
    *,
    observe: bool = True,
    apart: float = 0.0,
    curve: bool = True,
) -> tuple[Run, nn.Module]:
    """One training. Equal arguments give equal bits on one thread.

    It ends early if f is no longer finite.

    Args:
        problem: the problem.
        base: the base optimizer.
        config: settings of the acceleration; None: the base optimizer alone, not wrapped.
        observe: tell the accelerated optimizer the loss of every step.
        apart: see `Problem.make_model`.
        curve: evaluate all along. False: at the last steps alone, which the result needs.

    Returns:
        The run and the trained model. The run has
        "result": means of the last evaluations, of "f", "loss", "validation_loss" and
        "validation_accuracy"; infinite (accuracy 0) if f was not finite;
        "averages": the same at running averages of the weights, by `averages.NAMES`, if the rate
        is constant; else empty;
        "curve": f at steps 10, 20, ..., or None; "seconds": of training alone; "steps";
        "stats": text.
    """
    model = problem.make_model(apart)
    optimizer = base.make(model, problem.weight_decay)
    accelerated = None if config is None else AndersonOptimizer(optimizer, anderson=config)
    optimizer = optimizer if accelerated is None else accelerated
    averages = Averages(model, problem.steps)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("", *NAMES)}
    seconds, done = 0.0, 0
    marks = sorted({*range(EVERY, problem.steps, EVERY), problem.steps})
    for mark in marks if curve else marks[-LAST:]:
        base.place(optimizer, training=True)
        for step in range(done, mark):
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = base.rate(step, problem.steps)
            optimizer.zero_grad()
            loss = problem.loss(model, step)
            loss.backward()
            if observe and accelerated is not None:
                accelerated.observe(loss)
            optimizer.step()
            seconds += time.perf_counter() - started
            averages.take()
        done = mark
        base.place(optimizer, training=False)
        found[""].append(problem.evaluate(model, base.coupled))
        if not math.isfinite(found[""][-1]["f"]):
            break
        for name in NAMES if mark in marks[-LAST:] and base.averaged else ():
            with averages.lent(name):
                found[name].append(problem.evaluate(model, base.coupled))
    run = {
        "result": _result(found[""]),
        "averages": {
            name: _result(found[name if math.isfinite(found[""][-1]["f"]) else ""])
            for name in (NAMES if base.averaged else ())
        },
        "curve": [evaluation["f"] for evaluation in found[""]] if curve else None,
        "seconds": seconds,
        "steps": done,
        "stats": None if accelerated is None else str(accelerated.anderson.stats),
    }
    return run, model


def steps_to(run: Run, level: float) -> float:
    """Steps until f was at most `level` at an evaluation; infinite if it never was."""
    for index, f in enumerate(run["curve"]):
        if f <= level:
            return min((index + 1) * EVERY, run["steps"])
    return math.inf


def least(problem: Problem, coupled: bool, models: Iterable[nn.Module], iterations: int) -> float:
    """Returns the least f that L-BFGS finds, full batch, in float64.

    Batch norm has the statistics of the whole training set.

    Args:
        problem: the problem.
        coupled: whether f includes the weight decay.
        models: starting points; they are not changed.
        iterations: largest number of L-BFGS iterations from each of them.
    """
    inputs, targets = problem.train
    double = inputs.double() if inputs.is_floating_point() else inputs
    problem = dataclasses.replace(problem, train=(double, targets))
    return min(_lbfgs(problem, coupled, model, iterations) for model in models)


def _lbfgs(problem: Problem, coupled: bool, start: nn.Module, iterations: int) -> float:
    model = copy.deepcopy(start).double().train()
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=iterations,
        max_eval=2 * iterations,
        history_size=30,
        tolerance_grad=0.0,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    best = math.inf

    def closure() -> Tensor:
        nonlocal best
        optimizer.zero_grad()
        loss = problem.losses(model(problem.train[0]), problem.train[1]).mean()
        f = problem.objective(model, loss, coupled)
        f.backward()
        best = min(best, f.item())
        return f

    optimizer.step(closure)
    return best


def _result(found: list[dict[str, float]]) -> dict[str, float]:
    if not math.isfinite(found[-1]["f"]):
        return dict.fromkeys(found[-1], math.inf) | {"validation_accuracy": 0.0}
    last = found[-LAST:]
    return {name: sum(evaluation[name] for evaluation in last) / len(last) for name in last[0]}
