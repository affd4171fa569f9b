"""The lagged loss check: an accelerated step is judged by the loss of the next forward pass."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from aadl_hvd.checkpoint.shard_state import LossState, OwnLossState
from aadl_hvd.core.solve import Vector
from aadl_hvd.errors import ConfigError

_MEDIAN = 0.4549  # of the square of a normal variable of variance 1


class LossCheck:
    """Judges an accelerated step by the observed losses of the next step.

    A point is on trial if it was accepted in a step in which every rank had observed its loss. The
    losses of the next step decide. The point is rejected if the mean loss has risen by more than
    the losses' own spread.

    Decisions use sums over ranks only, so that they are the same on every rank. The trial itself
    may be missing on a rank that has loaded a checkpoint since.

    Implements `reduction.Payload`.

    Attributes:
        observed: whether all ranks had a loss in the last acceleration step.
        verdict_due: whether the next step begins with a verdict; the same on every rank.
    """

    part = "gram"
    PAYLOAD = 3
    TOLERANCE = 2.0  # in standard deviations of the difference of two losses
    ROUNDING = 1e-6  # relative; at rest, float32 losses differ by rounding alone
    SPREADS = OwnLossState.SPREADS  # number of recent spreads of which the median is taken

    def __init__(self) -> None:
        self.observed = False
        self.verdict_due = False
        self._given: list[float | Tensor] = []
        self._losses: list[list[float | Tensor]] = []  # of the last step and of this one
        self._variances: deque[float] = deque(maxlen=self.SPREADS)
        self._last_difference: float | None = None
        self._after_base_step = True
        self._loss = math.nan
        self._tolerance = 0.0
        self._trial: Tensor | None = None

    @property
    def trial(self) -> Tensor | None:
        """The base step's rows [rows] while a point is on trial on this rank."""
        return self._trial

    @property
    def current(self) -> float | Tensor | None:
        """This rank's loss of the step that runs, []; None if it was not observed."""
        losses = self._losses[-1] if self._losses else []
        if len(losses) > 1:
            total = sum(losses[1:], losses[0])
            return total / len(losses)
        return losses[0] if losses else None

    def observe(self, loss: float | Tensor) -> None:
        """Notes this rank's loss at the present weights. The mean of several calls counts."""
        # A copy: users may write the next loss into the same memory.
        own = loss.detach().reshape(()).clone() if isinstance(loss, Tensor) else float(loss)
        self._given.append(own)

    def next_step(self) -> None:
        """Begins a step. The losses observed so far belong to it."""
        self._after_base_step = not self.verdict_due
        given, self._given = self._given, []
        self._losses = [*self._losses[-1:], given]

    def pending(self) -> list[Tensor]:
        """Losses that are still on the device, [] each."""
        return [loss for losses in self._losses for loss in losses if isinstance(loss, Tensor)]

    def pack(self, numbers: Iterable[Vector]) -> Vector:
        """[3] numbers to be summed: this rank's loss, whether it has one, its spread."""
        known = iter(numbers)
        self._losses = [
            [float(next(known)[0]) if isinstance(loss, Tensor) else loss for loss in losses]
            for losses in self._losses
        ]
        before, now = [[], *self._losses][-2:]
        if not now:
            return np.zeros(self.PAYLOAD)
        loss = _mean(now)
        self._losses[-1] = [loss]
        if before and self._after_base_step:
            self._note_spread(loss - _mean(before))
        spread = float(np.median(self._variances)) / _MEDIAN if self._variances else 0.0
        return np.array([loss, 1.0, spread])

    def unpack(self, sums: Vector, size: int) -> None:
        """Takes in the sums of the payload in an acceleration step."""
        loss, count, spread = (float(x) for x in sums)
        self.observed = count == size and math.isfinite(loss)
        self._loss = loss / size
        # Of the mean over ranks, and of the difference of two.
        self._tolerance = self.TOLERANCE * math.sqrt(2.0 * max(spread, 0.0)) / size
        self._tolerance += self.ROUNDING * abs(self._loss)

    def start_trial(self, base_rows: Tensor, spreads: float = TOLERANCE) -> None:
        """Puts an accepted point on trial.

        Args:
            base_rows: this rank's rows of the weights that the base step had reached, [rows].
            spreads: the rise that rejects it, in standard deviations of a difference of losses.
        """
        self.verdict_due, self._trial = True, base_rows
        self._tolerance *= spreads / self.TOLERANCE

    def drop_trial(self) -> None:
        """Forgets the base step. The next verdict will be that the point stays."""
        self._trial = None

    def verdict_payload(self) -> Vector:
        """[4] numbers to be summed over ranks for `verdict`."""
        numbers = [np.array([float(loss)]) for loss in self.pending()]
        return np.append(self.pack(numbers), self._trial is not None)

    def verdict(self, sums: Vector, size: int) -> tuple[bool | None, Tensor | None]:
        """Ends the trial, from the sums of `verdict_payload` in the step after.

        Returns:
            Whether the point is rejected, None if nothing can be said; and the rows [rows] of the
            base step to go back to, None if the point stays.
        """
        loss, count, _, trials = (float(x) for x in sums)
        trial, self._trial = self._trial, None
        self.verdict_due = False
        if trial is None or trials < size or count < size:
            return None, None
        rejected = not loss / size <= self._loss + self._tolerance
        if not rejected:
            return False, None
        self._losses[-1] = []  # the point is taken back, so the next difference is no spread
        return True, trial

    def state(self) -> LossState:
        """What is the same on every rank."""
        return LossState(
            observed=self.observed,
            verdict_due=self.verdict_due,
            loss=self._loss,
            tolerance=self._tolerance,
        )

    def own_state(self) -> OwnLossState:
        """What this rank alone knows of its losses."""
        return OwnLossState(
            losses=tuple(tuple(float(loss) for loss in losses) for losses in self._losses),
            variances=tuple(self._variances),
            last_difference=self._last_difference,
        )

    def load_state(self, state: LossState, own: OwnLossState | None) -> None:
        """Loads what `state` returned, and `own_state` on this rank where that is known.

        What was observed for the step to come stays. `start_trial` puts a trial in.
        """
        self.observed, self.verdict_due = state.observed, state.verdict_due
        self._loss, self._tolerance = state.loss, state.tolerance
        self._trial = None
        if own is not None:
            self._losses = [list(losses) for losses in own.losses]
            self._last_difference = own.last_difference
            self._variances = deque(own.variances, maxlen=self.SPREADS)

    def note_losses(self, losses: Sequence[float]) -> None:
        """Takes in the spread of this rank's losses of successive steps."""
        for before, after in itertools.pairwise(losses):
            square = (after - before) * (after - before)  # a power raises where it overflows
            if math.isfinite(square):
                self._variances.append(square / 2.0)

    def _note_spread(self, difference: float) -> None:
        # Successive differences of a smooth curve are nearly equal, whatever its slope.
        last, self._last_difference = self._last_difference, difference
        if last is None:
            return
        # A product, because a power of floats raises where it overflows, on this rank alone.
        square = (difference - last) * (difference - last)
        if math.isfinite(square):
            self._variances.append(square / 4.0)


def check_loss(loss: Any) -> None:
    """Raises a ConfigError where a loss is not one number."""
    count = loss.numel() if isinstance(loss, Tensor) else 1
    if count != 1 or not isinstance(loss, Tensor | float | int | np.number):
        raise ConfigError(
            f"Invalid loss={type(loss).__name__} of {count} elements. Must be a number or a "
            "tensor with one element."
        )


def _mean(losses: list[float | Tensor]) -> float:
    return sum(float(loss) for loss in losses) / len(losses)
