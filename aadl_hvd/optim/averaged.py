"""The model with averaged weights in it: what `averaged_weights` does."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadl_hvd.errors import AndersonError, ConfigError, ReplicaMismatchError, UnsupportedError
from aadl_hvd.optim.batch_norm import batch_norms, kept_batch_norm, recalibrate_batch_norm
from aadl_hvd.optim.engine import Closure, Engine, number
from aadl_hvd.optim.shards import reshard


@contextlib.contextmanager
def averaged_weights(
    engine: Engine,
    loss: Closure | None,
    which: float | str | None,
    model: torch.nn.Module | None,
    batches: Iterable[Any],
    forward: Callable[[Any], object] | None,
) -> Iterator[float | None]:
    """See `AcceleratedOptimizer.averaged_weights`."""
    accelerator, problem = engine.accelerator, engine.problem
    names = accelerator.config.averages
    batches = list(batches)
    _check_request(engine, loss, which, model, batches)
    hash(problem.signature)  # up to date with the parameter groups
    if not accelerator.agreed:  # averages may have been loaded
        accelerator.agree(problem)
    put_back = problem.copy_weights()

    def gather_anew() -> None:
        if problem.sharded and model is not None:
            reshard(model)

    def restore() -> None:
        put_back()
        gather_anew()

    def put_in(kind: float | None) -> bool:
        if kind is None:
            put_back()
        elif not accelerator.put_average(problem, kind):
            return False
        gather_anew()
        if model is not None:
            recalibrate_batch_norm(model, batches, mean_over_ranks, forward)
        return True

    def mean_over_ranks(values: Tensor) -> Tensor:
        return accelerator.comm.sum_tensor(values) / accelerator.comm.size

    def mean_loss() -> float:
        assert loss is not None
        return float(accelerator.mean_over_ranks(np.array([number(loss())]))[0])

    with contextlib.ExitStack() as undo:
        if model is not None:
            undo.enter_context(kept_batch_norm(model))
        undo.callback(restore)
        engine.averaging = True
        undo.callback(setattr, engine, "averaging", False)
        chosen: float | None
        if which != "auto":
            chosen = which  # type: ignore[assignment]
        elif loss is not None:
            losses = {kind: mean_loss() for kind in (None, *names) if put_in(kind)}
            chosen = min(losses, key=lambda kind: (not losses[kind] < math.inf, losses[kind]))
        else:
            chosen = accelerator.best_average()
        if not put_in(chosen):
            chosen = None
            put_in(None)
        yield chosen


def _check_request(
    engine: Engine,
    loss: Closure | None,
    which: float | str | None,
    model: torch.nn.Module | None,
    batches: list[Any],
) -> None:
    """What one rank refuses is an error on all, and all must ask for the same. Collective."""
    names = engine.accelerator.config.averages
    sharded = engine.problem.sharded
    refusal: AndersonError | None = None
    if not (which is None or which == "auto" or which in names):
        refusal = ConfigError(
            f"Invalid which={which!r}. Must be 'auto', None, or one of averages={names!r}."
        )
    elif model is not None and not batches and (batch_norms(model) or not sharded):
        refusal = ConfigError("Invalid batches=[]. Must hold at least one with model=...")
    elif model is None and sharded:
        refusal = UnsupportedError(
            "Invalid model=None with parameters that fully_shard has sharded. Must be the model: "
            "its modules have to gather the averaged weights."
        )
    elif engine.averaging:
        refusal = UnsupportedError(
            "Invalid averaged_weights() inside averaged_weights(). Leave the outer block first."
        )
    asked = [None, "auto", *names].index(which) if refusal is None else -1
    asked = 4 * asked + 2 * (loss is None) + (model is None)
    own = np.array([refusal is not None, asked, asked**2], np.float64)
    refused, mean, square = engine.accelerator.mean_over_ranks(own)
    if refusal is not None:
        raise refusal
    if refused or square != mean**2:
        raise ReplicaMismatchError(
            f"Another rank refused averaged_weights(), or asked for something else than "
            f"which={which!r}, loss {'not ' * (loss is None)}given, model "
            f"{'not ' * (model is None)}given. All must ask for the same."
        )
