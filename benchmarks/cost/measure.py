"""The measurement of all sweeps: acceleration against the same steps without it.

An accelerated and a plain optimizer take turns in one program, so that other work on the machine
slows both. Only public names of the library are used: its timers, its counters, its bytes.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from aadl_hvd import AndersonConfig, AndersonOptimizer
from benchmarks import report
from benchmarks.workload import CYCLE_PARTS, Workload

# The parts of an acceleration step that are not needed for storing a pair.
GRAM_TO_WRITE = ("gram", "solve", "update", "gather", "write")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to accelerate.

    Attributes:
        name: name in tables and files.
        config: settings of the library.
        falling: the learning rate falls in every step; then an update reads R, too.
        cycles: cycles of p steps in a turn.
    """

    name: str
    config: AndersonConfig
    falling: bool = False
    cycles: int = 1


class Task(Protocol):
    """Something to train."""

    @property
    def base(self) -> torch.optim.Optimizer:
        """The optimizer without acceleration."""

    def named(self, prefix: str) -> list[tuple[str, nn.Parameter]]:
        """Parameters with names, as Horovod wants them."""

    def prepare(self) -> None:
        """Does the work before a step that is not timed."""

    def step(self, optimizer: Any) -> None:
        """Does the work that is timed."""


class Quadratic(Workload):
    """A gradient that costs next to nothing, so that a step is the optimizer's alone."""

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        super().__init__(shapes)
        self.base = torch.optim.SGD(self.parameters, lr=0.5, momentum=0.5, foreach=True)

    def prepare(self) -> None:
        """Sets the gradient."""
        self.backward()

    def step(self, optimizer: Any) -> None:
        """The optimizer's step, in which Horovod reduces the gradient."""
        optimizer.step()


class Training:
    """A whole training step: forward, backward, the optimizer's step.

    Args:
        name: name of a problem of `models.problems`.
        rank: rank of this process.
        ranks: number of ranks that share the data.
    """

    def __init__(self, name: str, rank: int, ranks: int) -> None:
        from models.problems import build

        self._problem = build(name, rank=rank, ranks=ranks)
        self._model = self._problem.make_model()
        self.base = self._problem.make_optimizer(self._model)
        self._steps = 0

    def named(self, prefix: str) -> list[tuple[str, nn.Parameter]]:
        """Parameters with names."""
        return list(self._model.named_parameters(prefix=prefix))

    def prepare(self) -> None:
        """Does nothing."""

    def step(self, optimizer: Any) -> None:
        """Does a training step; an accelerated optimizer observes the loss."""
        optimizer.zero_grad()
        loss = self._problem.loss(self._model, self._steps)
        loss.backward()
        if hasattr(optimizer, "observe"):
            optimizer.observe(loss)
        optimizer.step()
        self._steps += 1


@dataclasses.dataclass(frozen=True)
class Engine:
    """How optimizers are made, with Horovod or without.

    Attributes:
        plain: makes the optimizer without acceleration.
        accelerated: makes the accelerated optimizer.
        barrier: all ranks leave it together.
    """

    plain: Callable[[Task], Any]
    accelerated: Callable[[Task, AndersonConfig], Any]
    barrier: Callable[[], None]


def in_one_process() -> Engine:
    """Returns the engine without Horovod."""
    return Engine(
        plain=lambda task: task.base,
        accelerated=lambda task, config: AndersonOptimizer(task.base, anderson=config),
        barrier=lambda: None,
    )


def through_horovod() -> Engine:
    """Returns the engine on Horovod's ranks."""
    import horovod.torch as hvd

    from aadl_hvd import DistributedAndersonOptimizer

    return Engine(
        plain=lambda task: hvd.DistributedOptimizer(task.base, task.named("own")),
        accelerated=lambda task, config: DistributedAndersonOptimizer(
            task.base, task.named("accelerated"), anderson=config
        ),
        barrier=hvd.barrier,
    )


def measure(
    setting: Setting, make_task: Callable[[], Task], turns: int, engine: Engine
) -> dict[str, Any]:
    """Times a setting against the plain optimizer. Collective.

    Args:
        setting: what to measure.
        make_task: makes the same task each time.
        turns: turns of each optimizer, after the history is full.
        engine: result of `in_one_process` or `through_horovod`.

    Returns:
        On this rank, medians with quartiles over turns. Seconds: "own_step_s", a plain step;
        "acceleration_step_s", an acceleration step less a plain one; "gram_to_write_s", its parts
        that are not needed for storing; "parts_s", the library's timers for a cycle of p steps.
        Ratios to the plain step: "step_over_own", the mean over a cycle; "between_over_own", a step
        that does not accelerate. "sent_bytes": bytes that a cycle passed to collectives, by part.
        "history_bytes": bytes of history and averages. "cycles" and "accelerated": their numbers.
    """
    gc.collect()  # an earlier optimizer and its history are in reference cycles
    config = setting.config
    p = config.frequency
    own, task = make_task(), make_task()
    plain, optimizer = engine.plain(own), engine.accelerated(task, config)
    stats = optimizer.anderson.stats

    def run(what: Task, by: Any, count: int) -> list[float]:
        times = []
        for _ in range(count):
            what.prepare()
            engine.barrier()
            times.append(seconds_of(lambda: what.step(by)))
            if setting.falling and by is optimizer:
                by.param_groups[0]["lr"] *= 0.999
        return times

    run(task, optimizer, p * (config.history_depth + 2))
    run(own, plain, 3)
    accelerated, sent = stats.accelerated, dict(stats.bytes)
    plain_s: list[float] = []
    last_s: list[float] = []
    between_s: list[float] = []
    ratios: list[float] = []
    parts_s: dict[str, list[float]] = {part: [] for part in CYCLE_PARTS}
    for _ in range(turns):
        turn = run(own, plain, max(p * setting.cycles, 2))
        before = dict(stats.seconds)
        mine = run(task, optimizer, p * setting.cycles)
        for part, found in parts_s.items():
            found.append((stats.seconds[part] - before[part]) / setting.cycles)
        plain_s += turn
        last_s += mine[p - 1 :: p]
        between_s += [t for i, t in enumerate(mine, 1) if i % p]
        ratios.append(sum(mine) / len(mine) / (sum(turn) / len(turn)))
    cycles = turns * setting.cycles
    median = report.spread(plain_s)["median"]
    needed = zip(*map(parts_s.__getitem__, GRAM_TO_WRITE), strict=True)
    return {
        "name": setting.name,
        "p": p,
        "q": config.store_every,
        "m": config.history_depth,
        "averages": len(config.averages),
        "cycles": cycles,
        "accelerated": stats.accelerated - accelerated,
        "own_step_s": report.spread(plain_s),
        "acceleration_step_s": report.spread([t - median for t in last_s]),
        "gram_to_write_s": report.spread([sum(times) for times in needed]),
        "between_over_own": report.spread([t / median for t in between_s]) if between_s else None,
        "step_over_own": report.spread(ratios),
        "parts_s": {part: report.spread(found) for part, found in parts_s.items()},
        "sent_bytes": {
            part: round((stats.bytes[part] - had) / cycles)
            for part, had in sent.items()
            if stats.bytes[part] > had
        },
        "history_bytes": optimizer.anderson.history_bytes,
    }


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall-clock seconds of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
