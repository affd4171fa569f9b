"""What acceleration goes on from, out of the parts of an accelerator and back into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aadl_hvd.checkpoint.shard_state import OwnState, ShardState, origin_of
from aadl_hvd.core.acceptance import Acceptance
from aadl_hvd.core.averages import WeightAverages
from aadl_hvd.core.methods.base import Method
from aadl_hvd.core.moving_average import MovingAverage
from aadl_hvd.core.shard import WeightShard
from aadl_hvd.stats import Stats


class Persistence:
    """Reads and writes the state of the other modules of one rank.

    Args:
        shard: this rank's rows.
        method: with its history.
        acceptance: with noise, losses, pauses and trials.
        averages: for evaluation.
        moving_average: the paper's; None where it is off.
        ranks: how many ranks train together, and this one among them.
    """

    def __init__(
        self,
        shard: WeightShard,
        method: Method,
        acceptance: Acceptance,
        averages: WeightAverages,
        moving_average: MovingAverage | None,
        ranks: tuple[int, int],
    ) -> None:
        self._shard, self._method, self._acceptance = shard, method, acceptance
        self._averages, self._moving_average = averages, moving_average
        self._size, self._rank = ranks

    def shard_state(self, calls: int) -> ShardState:
        """This rank's shard of the state, in host memory. Not collective.

        Args:
            calls: number of the last step.
        """
        acceptance, window = self._acceptance, self._moving_average
        own = OwnState(noise=acceptance.noise.own_state(), losses=acceptance.losses.own_state())
        return ShardState(
            sharding=origin_of(self._shard.sharding),
            calls=calls,
            ranks=self._size,
            columns=self._method.history.state(),
            gram=self._method.gram.state(),
            averages=self._averages.state(),
            window=None if window is None else window.state(),
            noise=acceptance.noise.state(),
            losses=acceptance.losses.state(),
            backoff=acceptance.backoff.state(),
            trial=acceptance.trial_state(),
            own={str(self._rank): own},
        )

    @torch.no_grad()
    def load_state(self, state: ShardState, continues: bool) -> None:
        """Loads what `shard_state` returned, for this rank's rows and columns.

        Args:
            state: of the same sharding.
            continues: as if the run had not been interrupted; else nothing is on trial.
        """
        own = state.own.get(str(self._rank)) if continues else None
        own_noise, own_losses = (None, None) if own is None else (own.noise, own.losses)
        acceptance, window = self._acceptance, self._moving_average
        self._method.history.load_state(state.columns)
        self._method.history.generation = 0  # the same on all ranks
        self._method.gram.load_state(state.gram)
        self._averages.load_state(state.averages)
        if window is not None:
            window.clear()
            if state.window is not None:
                window.load_state(state.window)
        acceptance.noise.load_state(state.noise, own_noise, self._shard.device)
        acceptance.backoff.load_state(state.backoff)
        acceptance.trial = None
        if not continues:
            acceptance.losses.drop_trial()
            return
        acceptance.losses.load_state(state.losses, own_losses)
        acceptance.load_trial(state.trial)

    @torch.no_grad()
    def backup(self, *others: object) -> Callable[[], None]:
        """Copies all that a reset and a load change, to host memory; the result puts it back.

        Args:
            others: objects beside these modules whose attributes are put back as well.
        """
        acceptance, method = self._acceptance, self._method
        owners: Sequence[Any] = [
            *(*others, method.history, method.gram, acceptance),
            *(acceptance.noise, acceptance.losses, acceptance.backoff),
            self._averages,
            *([] if self._moving_average is None else [self._moving_average]),
        ]
        kept = [(owner, dict(vars(owner))) for owner in owners]
        held = (value for _, attributes in kept for value in attributes.values())
        tensors = {id(value): value for value in held if isinstance(value, Tensor)}  # each once
        copies = [(tensor, tensor.to("cpu", copy=True)) for tensor in tensors.values()]

        def put_back() -> None:
            for owner, attributes in kept:
                vars(owner).clear()
                vars(owner).update(attributes)
            with torch.no_grad():
                for tensor, contents in copies:
                    tensor.copy_(contents)

        return put_back


def put_back_counters(stats: Stats) -> Callable[[], None]:
    """Copies the counters that are counted in place; the result puts them back."""
    rejected, resets = dict(stats.rejected), dict(stats.resets)

    def put_back() -> None:
        stats.rejected, stats.resets = rejected, resets

    return put_back
