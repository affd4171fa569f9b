"""What acceleration goes on from, out of the parts of an accelerator and back into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aadl_hvd.checkpoint.shard_state import OwnState, ShardState, origin_of
from aadl_hvd.core.acceptance import Acceptance
from aadl_hvd.core.averages import WeightAverages
from aadl_hvd.core.handover import Handover
from aadl_hvd.core.methods.residual import ResidualNorm
from aadl_hvd.core.methods.subspace import Subspace
from aadl_hvd.core.moving_average import MovingAverage
from aadl_hvd.core.shard import WeightShard
from aadl_hvd.stats import Stats


class Persistence:
    """Reads and writes the state of the other modules of one rank.

    Args:
        shard: this rank's rows.
        residual: the residual-norm method with its history.
        subspace: the subspace method with its blocks.
        handover: which of them is at work.
        acceptance: with noise, losses, pauses and trials.
        averages: for evaluation.
        moving_average: the paper's; None where it is off.
        ranks: how many ranks train together, and this one among them.
    """

    def __init__(
        self,
        shard: WeightShard,
        residual: ResidualNorm,
        subspace: Subspace,
        handover: Handover,
        acceptance: Acceptance,
        averages: WeightAverages,
        moving_average: MovingAverage | None,
        ranks: tuple[int, int],
    ) -> None:
        self._shard, self._residual, self._acceptance = shard, residual, acceptance
        self._subspace, self._handover = subspace, handover
        self._averages, self._moving_average = averages, moving_average
        self._size, self._rank = ranks

    def shard_state(self, calls: int, decays: tuple[float, ...]) -> ShardState:
        """This rank's shard of the state, in host memory. Not collective.

        Args:
            calls: number of the last step.
            decays: the weight decays in stored residuals.
        """
        acceptance, window = self._acceptance, self._moving_average
        at_work = self._handover.subspace
        own = OwnState(
            noise=acceptance.noise.own_state(),
            losses=acceptance.losses.own_state(),
            block=self._subspace.own_state() if at_work else None,
        )
        return ShardState(
            sharding=origin_of(self._shard.sharding),
            calls=calls,
            ranks=self._size,
            decays=decays,
            columns=self._residual.history.state(),
            gram=self._residual.gram.state(),
            averages=self._averages.state(),
            window=None if window is None else window.state(),
            noise=acceptance.noise.state(),
            losses=acceptance.losses.state(),
            backoff=acceptance.backoff.state(),
            handover=self._handover.state(calls),
            subspace=self._subspace.state() if at_work else None,
            trial=acceptance.trial_state(),
            own={str(self._rank): own},
        )

    @torch.no_grad()
    def load_state(self, state: ShardState, continues: bool, calls: int) -> None:
        """Loads what `shard_state` returned, for this rank's rows and columns. Collective.

        A jump that the next step adds is gathered anew.

        Args:
            state: of the same sharding.
            calls: number of the last step, from now on.
            continues: as if the run had not been interrupted; else nothing is on trial.
        """
        own = state.own.get(str(self._rank)) if continues else None
        own_noise, own_losses = (None, None) if own is None else (own.noise, own.losses)
        acceptance, window = self._acceptance, self._moving_average
        self._handover.load_state(state.handover, calls, continues)
        residual, subspace = self._residual, self._subspace
        if self._handover.subspace:
            residual.release()
            subspace.reset()
            if state.subspace is not None:
                subspace.load_state(state.subspace, None if own is None else own.block)
        else:
            subspace.release()
            residual.history.load_state(state.columns)
            residual.gram.load_state(state.gram)
        for method in (residual, subspace):
            method.restart_generation()  # the same on all ranks
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
        acceptance, residual, subspace = self._acceptance, self._residual, self._subspace
        owners: Sequence[Any] = [
            *(*others, residual.history, residual.gram, acceptance),
            *(subspace, subspace.blocks, subspace.trust, self._handover),
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
