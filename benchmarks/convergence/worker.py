"""The program of every rank: all runs of a plan, one after the other, in one launch."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from benchmarks.convergence.contenders import Contender, make
from benchmarks.convergence.plan import Plan
from benchmarks.convergence.results import Results, Run, plain
from models import dist
from models.problems import Problem, build

MARKS = 40
CURVE_POINTS = {True: 400, False: 100}
"""Largest number of losses that are stored of a run, with a full batch or without."""
FEW = 8
WRITE_EVERY = 20.0
SAY_EVERY = 2.0


def main(plan_path: Path) -> None:
    """Runs the plan; rank 0 writes results and shows the progress."""
    dist.start()
    plan = Plan.read(plan_path)
    results = Results(plan.results) if hvd.rank() == 0 else None
    progress = _Progress(plan)
    gc.freeze()  # else collecting takes longer than a small run
    written = time.monotonic()
    try:
        for number, (name, contender, seed) in enumerate(plan.runs):
            problem = build(
                name, seed=seed, rank=hvd.rank(), ranks=hvd.size(), **plan.options[name]
            )
            started = time.monotonic()
            run = {"problem": name, "contender": contender, "seed": seed}
            run |= train(problem, contender)
            gc.collect()  # optimizers and Horovod's hooks on them are reference cycles
            if results is not None:
                results.add(run)
                progress.tell(number, run, time.monotonic() - started)
                if time.monotonic() - written > WRITE_EVERY:
                    results.write()
                    written = time.monotonic()
    finally:
        gc.unfreeze()  # else libraries complain of leaks at the end
        if results is not None:
            results.write()
    hvd.shutdown()


def train(problem: Problem, contender: str) -> Run:
    """One training, measured at `MARKS` points on the way. Collective.

    It ends early if the loss is no longer finite. All ranks have the same weights, so they agree.
    """
    model = problem.make_model()
    made = make(contender, problem, model)
    marks = sorted({round(i * problem.steps / MARKS) for i in range(MARKS + 1)})
    losses = torch.full((problem.steps,), math.nan, dtype=torch.float64)
    metrics: dict[str, list[float]] = defaultdict(list)
    averaged: dict[str, list[float]] = defaultdict(list)
    seconds, done, diverged = 0.0, 0, None
    for mark in marks:
        started = time.perf_counter()
        for step in range(done, mark):
            losses[step] = _step(problem, model, made, step)
        seconds += time.perf_counter() - started
        done = mark
        with _evaluated(made.optimizer):
            found = _metrics(problem, model, made)
        for name, value in found.items():
            metrics[name].append(value)
        if made.averages:
            with made.optimizer.averaged_weights(_few_batches(problem, model, done)):
                for name, value in _metrics(problem, model, made).items():
                    averaged[name].append(value)
        if not math.isfinite(found["training_loss"]):
            diverged = mark
            break
    losses = hvd.allreduce(losses, op=hvd.Average, name="losses")
    stride = max(1, -(-problem.steps // CURVE_POINTS[problem.full_batch]))
    statistics = getattr(made.optimizer, "anderson", None)
    return {
        "steps": problem.steps,
        "full_batch": problem.full_batch,
        "diverged": diverged,
        "seconds_per_step": seconds / max(done, 1),
        "final": {name: values[-1] for name, values in metrics.items()},
        "averaged_final": {name: values[-1] for name, values in averaged.items()} or None,
        "anderson": None if statistics is None else dataclasses.asdict(statistics.stats),
        "marks": marks[: len(metrics["training_loss"])],
        "metrics": plain(dict(metrics), 5),
        "averaged_metrics": plain(dict(averaged), 5) or None,
        # Entry i is the mean over ranks of the loss that step i * stride saw before its update.
        "loss": {"stride": stride, "values": plain(losses[:done:stride].tolist(), 5)},
    }


def _metrics(problem: Problem, model: nn.Module, made: Contender) -> dict[str, float]:
    """The problem's metrics, and the objective: all base optimizers here couple weight decay."""
    found = problem.metrics(model)
    decay = sum(
        0.5 * group.get("weight_decay", 0.0) * weights.detach().double().square().sum().item()
        for group in made.optimizer.param_groups
        for weights in group["params"]
    )
    return found | {"objective": found["training_loss"] + decay}


def _few_batches(problem: Problem, model: nn.Module, done: int) -> Callable[[], float]:
    """This rank's loss on its last training batches, by which averaged weights are chosen."""
    count = 1 if problem.full_batch else FEW

    def loss() -> float:
        with torch.no_grad():
            losses = [problem.loss(model, max(done - 1 - i, 0)) for i in range(count)]
        return torch.stack(losses).mean().item()

    return loss


def _evaluated(optimizer: Any) -> contextlib.AbstractContextManager[Any]:
    """Context with the weights to evaluate the base optimizer at: NeumannOptimizer has its own."""
    own = getattr(optimizer, "evaluation_weights", None)
    return contextlib.nullcontext() if own is None else own()


def _step(problem: Problem, model: nn.Module, made: Contender, step: int) -> float:
    rate = problem.learning_rate(step)
    if rate is not None:
        for group in made.optimizer.param_groups:
            group["lr"] = rate
    made.optimizer.zero_grad()
    loss = problem.loss(model, step)
    loss.backward()
    if made.observes:
        made.optimizer.observe(loss)
    made.optimizer.step()
    if made.after_step is not None:
        # The factorization may refuse values that are not finite. The run is recorded as diverged.
        with contextlib.suppress(torch.linalg.LinAlgError):
            made.after_step()
    return loss.item()


class _Progress:
    """Lines on stderr, one every few seconds at most, with an estimate of the time left."""

    def __init__(self, plan: Plan) -> None:
        self._runs = plan.runs
        self._times: dict[str, list[float]] = defaultdict(list)
        self._said = -math.inf

    def tell(self, number: int, run: Run, seconds: float) -> None:
        self._times[run["problem"]].append(seconds)
        now, last = time.monotonic(), number + 1 == len(self._runs)
        if now - self._said < SAY_EVERY and not last:
            return
        self._said = now
        loss: Any = run["final"]["training_loss"]
        what = f"{run['problem']} {run['contender']} seed {run['seed']}"
        left = "done" if last else f"about {_duration(self._left(number + 1))} left"
        print(
            f"{number + 1}/{len(self._runs)}  {what}: training loss {loss:.3e}, "
            f"{seconds:.1f} s; {left}",
            file=sys.stderr,
            flush=True,
        )

    def _left(self, first: int) -> float:
        means = {name: sum(times) / len(times) for name, times in self._times.items()}
        other = sum(means.values()) / len(means)
        return sum(means.get(problem, other) for problem, _, _ in self._runs[first:])


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
