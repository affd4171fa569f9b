"""The optimizers that are compared, each made from a problem's own base optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer
from benchmarks.convergence.aadl import Aadl
from models.problems import Problem

# Contenders that differ from the default in the history's dtype only.
HISTORY_DTYPES = {"bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """An optimizer in training.

    Attributes:
        optimizer: a distributed optimizer.
        after_step: to be called after each of its steps, or None.
        observes: its `observe` gets each step's loss.
        averages: it has averaged weights to evaluate.
    """

    optimizer: Any
    after_step: Callable[[], None] | None = None
    observes: bool = False
    averages: bool = False


def make(name: str, problem: Problem, model: nn.Module) -> Contender:
    """Makes the contender called `name`, one of `plan.CONTENDERS`. Collective."""
    base = problem.make_optimizer(model)
    named = list(model.named_parameters())
    settings = problem.paper
    if name in ("base", "aadl"):
        optimizer = hvd.DistributedOptimizer(base, named_parameters=named)
        if name == "base":
            return Contender(optimizer=optimizer)
        aadl = Aadl(
            optimizer,
            history_depth=settings.history_depth,
            frequency=settings.frequency,
            store_every=settings.store_every,
            relaxation=settings.relaxation,
        )
        return Contender(optimizer=optimizer, after_step=aadl.after_step)
    if name in ("default", *HISTORY_DTYPES):
        anderson = AndersonConfig(history_dtype=HISTORY_DTYPES.get(name))
        optimizer = DistributedAndersonOptimizer(base, named, anderson=anderson)
        # Averaged weights are measured for the default only.
        return Contender(optimizer=optimizer, observes=True, averages=name == "default")
    if name == "paper":
        settings = dataclasses.replace(settings, average_window=None)
    optimizer = DistributedAndersonOptimizer(base, named_parameters=named, anderson=settings)
    return Contender(optimizer=optimizer)
