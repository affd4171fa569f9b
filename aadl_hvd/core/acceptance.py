"""Decisions about accelerated points, each with its cause. Pure: the numbers come from outside."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from aadl_hvd.core.solve import Matrix, Vector
from aadl_hvd.schema import entries, instance, integer, listed, number, optional, sequence
from aadl_hvd.stats import Rejection


@dataclasses.dataclass
class Trial:
    """An accelerated step that the next residual has yet to confirm (Algorithm 1, line 20).

    Attributes:
        base_rows: this rank's block of the weights the base optimizer had reached, [rows].
        undo: the base optimizer's state then, for `FixedPoint.restore`.
        norm: ||r^k|| of the step that was accelerated, in units of the learning rate.
    """

    base_rows: Tensor
    undo: Any
    norm: float


class Backoff:
    """When to try at all: after bad experience, attempts are left out for a while.

    A rejection by loss leaves out the next `FIRST` attempts, twice as many with every further one
    in a row, up to `LONGEST`. Where descent rejects more than `STUCK` of some 30 attempts, the
    iteration is near a saddle that acceleration would keep it at: `LONGEST` are left out.

    Everything it hears of has come out of reductions: it is the same on every rank.
    """

    FIRST = 4
    LONGEST = 64
    STUCK = 0.5
    MEMORY = 0.97  # of the share of attempts that descent rejects, per attempt
    STATE = sequence(integer(0, LONGEST), integer(FIRST, LONGEST), number(0.0, 1.0))  # see `state`

    def __init__(self) -> None:
        self._left_out, self._next = 0, self.FIRST
        self._rejected = 0.0

    def state(self) -> list[float]:
        """All it knows, in plain types."""
        return [self._left_out, self._next, self._rejected]

    def take(self, state: list[float]) -> None:
        """Takes in what `state` returned."""
        left_out, following, self._rejected = state
        self._left_out, self._next = int(left_out), int(following)

    def ready(self) -> bool:
        """Whether this attempt is to be made; counts it if not."""
        if self._left_out == 0:
            return True
        self._left_out -= 1
        return False

    def judged_by_loss(self, rejected: bool) -> None:
        """Hears the verdict on an accepted point."""
        if not rejected:
            self._next = self.FIRST
            return
        self._left_out = max(self._left_out, self._next)
        self._next = min(2 * self._next, self.LONGEST)

    def judged_by_descent(self, rejected: bool) -> None:
        """Hears what became of an attempt."""
        self._rejected = self.MEMORY * self._rejected + (1.0 - self.MEMORY) * rejected
        if self._rejected > self.STUCK:
            self._left_out, self._rejected = self.LONGEST, 0.0


_MEDIAN = 0.4549  # of the square of a normal variable of variance 1


class LossWatch:
    """Judges an accelerated step by the loss of the next ordinary forward pass.

    A step in which every rank has said its loss and a point was accepted is on trial; the next
    step's losses decide: where they are higher than before by more than their own spread, the
    point is rejected.

    What decides has come out of reductions, so that it is the same on every rank; only the trial
    itself may be missing on a rank that has loaded a checkpoint since.
    """

    PAYLOAD = 3
    # In standard deviations of the difference of two losses.
    TOLERANCE = 2.0
    ROUNDING = 1e-6  # relative; losses are float32, and at rest they only round differently
    SPREADS = 20  # of late, that a loss's own spread is the median of
    # What `state` and `part` return; losses may be what they will.
    STATE = entries(
        {
            **{"observed": instance(bool), "verdict_due": instance(bool)},
            **{"loss": number(finite=False), "tolerance": number(0.0, finite=False)},
        }
    )
    PART = entries(
        {
            "losses": listed(listed(number(finite=False)), most=2),
            "variances": listed(number(0.0), most=SPREADS),
            "last_difference": optional(number(finite=False)),
        }
    )

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
    def on_trial(self) -> bool:
        """Whether this rank knows the way back."""
        return self._trial is not None

    def observe(self, loss: float | Tensor) -> None:
        """Takes note of this rank's loss at the present weights; the mean, if called again."""
        self._given.append(loss.detach() if isinstance(loss, Tensor) else float(loss))

    def next_step(self) -> None:
        """Begins a step: what was observed belongs to it."""
        self._after_base_step = not self.verdict_due
        given, self._given = self._given, []
        self._losses = [*self._losses[-1:], given]

    def unread(self) -> list[Tensor]:
        """Losses, [] each, that are numbers on the device yet: asking for each would be a wait."""
        return [loss for losses in self._losses for loss in losses if isinstance(loss, Tensor)]

    def read(self, numbers: Iterable[Vector]) -> None:
        """Takes in what `unread` returned, [1] each."""
        known = iter(numbers)
        self._losses = [
            [float(next(known)[0]) if isinstance(loss, Tensor) else loss for loss in losses]
            for losses in self._losses
        ]

    def payload(self) -> Vector:
        """[3] numbers to be summed over ranks: this rank's loss, whether it has one, its spread."""
        before, now = [[], *self._losses][-2:]
        if not now:
            return np.zeros(self.PAYLOAD)
        loss = _mean(now)
        self._losses[-1] = [loss]  # a number from here on: asking a GPU for it is a wait
        if before and self._after_base_step:
            self._note_spread(loss - _mean(before))
        spread = float(np.median(self._variances)) / _MEDIAN if self._variances else 0.0
        return np.array([loss, 1.0, spread])

    def _note_spread(self, difference: float) -> None:
        # Successive differences of a smooth curve are nearly equal, whatever its slope.
        last, self._last_difference = self._last_difference, difference
        if last is None:
            return
        # A product, for a power of floats raises where it overflows, and on this rank alone.
        square = (difference - last) * (difference - last)
        if math.isfinite(square):
            self._variances.append(square / 4.0)

    def event(self, sums: Vector, size: int) -> None:
        """Takes the sums of `payload` in an accelerated step."""
        loss, count, spread = (float(x) for x in sums)
        self.observed = count == size and math.isfinite(loss)
        self._loss = loss / size
        # Of the mean over ranks, and of the difference of two.
        self._tolerance = self.TOLERANCE * math.sqrt(2.0 * max(spread, 0.0)) / size
        self._tolerance += self.ROUNDING * abs(self._loss)

    def state(self) -> dict[str, Any]:
        """What is the same on every rank, in plain types."""
        return {
            "observed": self.observed,
            "verdict_due": self.verdict_due,
            "loss": self._loss,
            "tolerance": self._tolerance,
        }

    def part(self) -> dict[str, Any]:
        """What this rank alone knows of its losses, in plain types."""
        return {
            "losses": [[float(loss) for loss in losses] for losses in self._losses],
            "variances": list(self._variances),
            "last_difference": self._last_difference,
        }

    @property
    def trial(self) -> Tensor | None:
        """What `try_out` was given, where a point is on trial."""
        return self._trial

    def take(self, state: dict[str, Any], part: dict[str, Any] | None) -> None:
        """Takes in what `state` returned, and `part` on this rank where that is known.

        What was observed for the step to come stays. A trial has to be put in by `try_out`.
        """
        self.observed, self.verdict_due = state["observed"], state["verdict_due"]
        self._loss, self._tolerance = state["loss"], state["tolerance"]
        self._trial = None
        if part is not None:
            self._losses = [list(losses) for losses in part["losses"]]
            self._last_difference = part["last_difference"]
            self._variances = deque(part["variances"], maxlen=self.SPREADS)

    def try_out(self, base_rows: Tensor) -> None:
        """Puts an accepted point on trial.

        Args:
            base_rows: this rank's block of the weights the base optimizer had reached, [rows].
        """
        self.verdict_due, self._trial = True, base_rows

    def drop_trial(self) -> None:
        """Forgets the way back; the next verdict will be that nothing is known."""
        self._trial = None

    def verdict(self, sums: Vector, size: int, backoff: Backoff) -> Tensor | None:
        """Takes the sums of `payload` and `on_trial` in the step after.

        Returns:
            What `try_out` was given, to go back to, or None if the point stays.
        """
        loss, count, _, trials = (float(x) for x in sums)
        trial, self._trial = self._trial, None
        self.verdict_due = False
        if trial is None or trials < size or count < size:
            return None
        rejected = not loss / size <= self._loss + self._tolerance
        backoff.judged_by_loss(rejected)
        if not rejected:
            return None
        self._losses[-1] = []  # of a point that never was: the way from there is no spread
        return trial


def _mean(losses: list[float | Tensor]) -> float:
    return sum(float(loss) for loss in losses) / len(losses)


def judge_system(gram: Matrix, b: Vector, rr: float) -> Rejection | None:
    """Whether there is a least-squares problem to solve at all."""
    if not (np.isfinite(gram).all() and np.isfinite(b).all() and math.isfinite(rr)):
        return Rejection.NONFINITE
    if rr == 0.0 or not gram.any():
        return Rejection.DEGENERATE
    return None


def judge_update(slope: float, safeguard: str) -> Rejection | None:
    """Whether the update points downhill; slope is <w+ - w, r>, r being minus a gradient."""
    if not math.isfinite(slope):
        return Rejection.NONFINITE
    if safeguard == "descent" and slope <= 0.0:
        return Rejection.DESCENT
    return None


def judge_loss(base: float, accelerated: float) -> Rejection | None:
    """Whether the accelerated point is as good as the base optimizer's; NaN is not."""
    return None if accelerated <= base else Rejection.LOSS


def judge_residual(before: float, after: float) -> Rejection | None:
    """The paper's criterion: the norm of the residual must fall; NaN has not fallen."""
    return None if after < before else Rejection.RESIDUAL
