"""Anderson acceleration in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch

from aadl_hvd.comm.local import LocalCommunicator
from aadl_hvd.config import AndersonConfig
from aadl_hvd.errors import ConfigError
from aadl_hvd.optim import job
from aadl_hvd.optim.accelerated import AcceleratedOptimizer
from aadl_hvd.optim.checks import check_optimizer, checked_config
from aadl_hvd.optim.engine import Engine


class LocalEngine(Engine):
    """One process, in which nothing is reduced.

    Args:
        passes: micro-batches whose gradients a step adds up.
        independent: whether the process trains a model of its own, whatever job it is in.
        check: whether the job must be of one process.
    """

    def __init__(self, passes: int, independent: bool, check: bool) -> None:
        super().__init__(passes)
        self.independent = independent
        self._check = check

    def check_step(self) -> None:
        """Looks at the job, once: it may have been set up after the construction."""
        if self._check:
            job.check_alone()
            self._check = False


class AndersonOptimizer(AcceleratedOptimizer):
    """Adds Anderson acceleration to a torch optimizer, in one process.

    Needs neither Horovod nor MPI. In a job of several processes it is an error, unless every
    process trains a model of its own: replicas of one model would drift apart, for what one
    process decides from its losses and the noise of its gradients does not reach the others.
    The job is looked at here and at the first `observe` or `step`.

    The result is an instance of the given optimizer's class and shares its parameter groups and its
    state, so learning-rate schedulers made before go on working. Its attribute `anderson` is the
    `Accelerator`: `.stats`, `.history_bytes`, `.config`, `.reset()`.

    Memory: 2 m n numbers of history, 2 n for the last pair, 2 n for each of `averages`.

    A subclass may add methods and extend those that are here, by `super()`. Its constructor is
    `__new__`.

    Args:
        optimizer: any `torch.optim.Optimizer`. Use the result in its place from now on.
        backward_passes_per_step: micro-batches whose gradients are summed in every step. With 2 or
            more the noise of the gradient is measured from their differences; with 1 it is
            estimated from successive residuals, which is rougher.
        anderson: settings; None: `AndersonConfig()`.
        independent: True where each process of the job trains a model of its own.

    Raises:
        ConfigError: `anderson` is not an `AndersonConfig`, or an argument is out of range.
        UnsupportedError: Horovod, torch.distributed or MPI runs more processes than this one, and
            `independent` is not set; the optimizer is accelerated or distributed already, or its
            parameters cannot be accelerated.
        HistoryMemoryError: the history does not fit into free memory.
    """

    anderson_engine: LocalEngine

    def __new__(  # noqa: D102  (the class has the docstring)
        cls,
        optimizer: torch.optim.Optimizer,
        *,
        backward_passes_per_step: int = 1,
        anderson: AndersonConfig | None = None,
        independent: bool = False,
    ) -> Self:
        config = checked_config(anderson)
        check_optimizer(optimizer)
        must_be_alone = config.enabled and not independent
        if must_be_alone:
            job.check_alone()
        if backward_passes_per_step < 1:
            raise ConfigError(
                f"Invalid backward_passes_per_step={backward_passes_per_step!r}. Must be at least "
                "1."
            )
        if not isinstance(config.shard_group, str):
            raise ConfigError(
                f"Invalid shard_group={config.shard_group!r} in one process. Must be 'world'."
            )
        engine = LocalEngine(backward_passes_per_step, independent, must_be_alone)
        made = cls.accelerate(optimizer, engine, config, LocalCommunicator())
        made.anderson.check_memory(made.anderson_engine.problem)
        return made

    def __reduce_ex__(self, protocol: object) -> Any:
        """For copies and pickle: the class cannot be found by a name, so it is made anew."""
        engine = self.anderson_engine
        counters = self.anderson.stats.counters()
        made_of = engine.given, self.anderson.config, counters, engine.passes
        return _rebuilt, (self._anderson_public, *made_of, engine.independent)


def _rebuilt(
    public: Callable[..., AndersonOptimizer],
    optimizer: torch.optim.Optimizer,
    config: AndersonConfig,
    counters: dict[str, Any],
    passes: int,
    independent: bool,
) -> AndersonOptimizer:
    accelerated = public(
        optimizer,
        backward_passes_per_step=passes,
        anderson=config,
        independent=independent,
    )
    accelerated.anderson.stats.load_counters(counters)
    return accelerated
