"""Averages of the weights, on one rank's rows.

The paper's moving average replaces the weights and training goes on from it; the running averages
are for evaluation and leave training alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadl_hvd import kernels
from aadl_hvd.core.history import chunks
from aadl_hvd.core.solve import Vector
from aadl_hvd.schema import entries, integer, listed, number


class MovingAverage:
    """The last t iterates (Eq. 11), in a ring buffer of t * rows numbers.

    Args:
        window: t, at least 2.
        rows: number of rows of this rank.
        dtype: float32 or float64.
        device: where the parameters are.
    """

    def __init__(self, window: int, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._iterates = torch.zeros((window, rows), dtype=dtype, device=device)
        self._pushed = 0

    @property
    def full(self) -> bool:
        """Whether t iterates have been seen: before that, nothing is averaged."""
        return self._pushed >= self._iterates.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes allocated on this rank."""
        return self._iterates.numel() * self._iterates.element_size()

    def clear(self) -> None:
        """Forgets all iterates."""
        self._pushed = 0

    def push(self, w: Tensor) -> None:
        """Adds an iterate [rows]; the oldest one leaves."""
        self._iterates[self._pushed % self._iterates.shape[0]].copy_(w)
        self._pushed += 1

    def replace_last(self, w: Tensor) -> None:
        """Puts `w` in place of the newest iterate (the sequence goes on from the average)."""
        self._iterates[(self._pushed - 1) % self._iterates.shape[0]].copy_(w)

    def part(self) -> tuple[int, Tensor]:
        """Iterates seen; those of the window from the oldest, [at most t, rows], on the host."""
        window = self._iterates.shape[0]
        first = max(0, self._pushed - window)
        return self._pushed, self._iterates[[i % window for i in range(first, self._pushed)]].cpu()

    def take(self, pushed: int, iterates: Tensor) -> None:
        """Takes in what `part` returned, of this window or another."""
        window = self._iterates.shape[0]
        newest = iterates[-window:]
        # Places in the ring are kept: the order of a sum decides its last bit.
        self._pushed = pushed if len(newest) == window else len(newest)
        for i, w in enumerate(newest, self._pushed - len(newest)):
            self._iterates[i % window].copy_(w)

    def mean(self) -> Tensor:
        """The average of the window, [rows] (Eq. 11)."""
        return self._iterates.mean(dim=0)

    def spread(self) -> Tensor:
        """max over this rank's rows of sqrt(S) (Eq. 15), a tensor []; 0 where there are no rows.

        S is computed as the mean of squared deviations: equal to Eq. 15, without its cancellation.
        """
        if self._iterates.shape[1] == 0:
            return self._iterates.new_zeros(())
        largest = []
        for rows in chunks(self._iterates[0]):  # torch.var took 100 times as long
            window = self._iterates[:, rows]
            largest.append((window - window.mean(dim=0)).square_().mean(dim=0).max())
        return torch.stack(largest).max().sqrt()


class WeightAverages:
    """Running averages of the iterates, for evaluation; training never sees them.

    Several exponential ones at once, by their decay factors per step. Fed in accelerated steps only, where the rows are at hand anyway. With each goes the
    average of the residuals, because for a quadratic loss, r being minus its gradient,

        f(w) - f(avg w) = 1/2 <r + avg r, avg w - w>

    (the trapezoidal rule): the gain of every average is known without a forward pass, up to noise,
    which is smoothed over about 20 steps. Memory: 2 rows an average.

    Args:
        kinds: decay factors in (0, 1).
        every: steps between two calls of `push`.
        rows: number of rows of this rank.
        dtype: float32 or float64.
        device: where the parameters are.

    Attributes:
        use_kernels: whether `kernels` do the work; the same on every rank, or averages of two groups
            would differ by rounding.
        count: iterates taken in.
        parts: each of the averages.
    """

    SMOOTHING = 0.95
    STATE = entries(  # what `state` returns
        {
            **{"kinds": listed(number(0.0)), "every": integer(1), "gains": listed(number())},
            **{"measured": integer(), "count": integer()},
        }
    )

    def __init__(
        self,
        kinds: Sequence[float],
        every: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.kinds = tuple(kinds)
        self._every = every
        self.parts = [_Average(kind, every, rows, dtype, device) for kind in self.kinds]
        self.use_kernels = False
        self._gains: Vector = np.zeros(len(self.kinds))
        self._measured = self.count = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated on this rank."""
        return sum(average.nbytes for average in self.parts)

    @property
    def gains(self) -> dict[float, float]:
        """f(w) - f(avg w) of each average as measured, the same on every rank; NaN: unknown."""
        weight = 1.0 - self.SMOOTHING ** (self._every * self._measured)
        gains = self._gains / weight if weight else np.full(len(self.kinds), np.nan)
        return dict(zip(self.kinds, gains.tolist(), strict=True))

    def partial_gains(self, w: Tensor, r: Tensor, part: slice = slice(None)) -> Tensor:
        """This rank's part of the gains over an iterate and its residual, [rows] each.

        The sum is over rows `part` alone. [kinds] float64, on the device.
        """
        if not self.parts:
            return torch.empty(0, dtype=torch.float64, device="cpu")
        if not self.count:  # nothing to compare with, but `push` is to know if w is finite
            largest = w.abs().max() if w.numel() else w.new_zeros(())
            return (0.0 * largest).double().expand(len(self.kinds))
        # 1/2 <r + avg r, avg w - w>
        if self.use_kernels:
            sums = [average.sums for average in self.parts]
            first, end, _ = part.indices(w.numel())
            return kernels.gains(w, r, sums, slice(first, end)).mul_(0.5)
        # Chunks outside, so that w and r are read once.
        zero = w.new_zeros(len(self.parts), dtype=torch.float64)
        parts = [zero, *(self._gains_of(w[rows], r[rows], rows) for rows in chunks(w, part))]
        return torch.stack(parts).sum(dim=0).mul_(0.5)

    def push(self, w: Tensor, r: Tensor, gains: Vector) -> None:
        """Takes in an iterate and its residual, [rows] each.

        Args:
            w: the iterate.
            r: its residual.
            gains: `partial_gains` of them, summed over ranks.
        """
        if not np.isfinite(gains).all():
            return
        for average in self.parts:
            average.begin()
        if self.use_kernels and self.parts:
            sums = [average.sums for average in self.parts]
            kernels.take_in(w, r, sums, [average.weight for average in self.parts])
        for rows in () if self.use_kernels else chunks(w):
            for average in self.parts:
                average.add(w[rows], r[rows], rows)
        self.count += 1
        if self.count > 1:
            kept = self.SMOOTHING**self._every
            self._gains = kept * self._gains + (1.0 - kept) * gains
            self._measured += 1

    def mean(self, kind: float) -> Tensor | None:
        """This rank's rows of an average, [rows]; None if nothing has been taken in yet."""
        average = self.parts[self.kinds.index(kind)]
        return average.mean()[0] if self.count else None

    def state(self) -> dict[str, Any]:
        """What is the same on every rank, in plain types."""
        return {
            "kinds": list(self.kinds),
            "every": self._every,
            "gains": self._gains.tolist(),
            "measured": self._measured,
            "count": self.count,
        }

    def part(self) -> list[Tensor]:
        """Of each kind this rank's rows, [2, rows], on the host; none if none is known."""
        return [average.sums.cpu().clone() for average in self.parts] if self.count else []

    def take(self, state: dict[str, Any], part: Sequence[Tensor]) -> bool:
        """Takes in what `state` and `part` returned.

        Returns:
            Whether they are of these kinds; if not, all averages begin anew.
        """
        self.clear()
        known = state["every"] == self._every and set(self.kinds) <= set(state["kinds"])
        if not known or not state["count"]:
            return known
        places = [state["kinds"].index(kind) for kind in self.kinds]
        self._gains = np.array(state["gains"], dtype=np.float64)[places]
        self._measured, self.count = state["measured"], state["count"]
        for average, place in zip(self.parts, places, strict=True):
            average.count = self.count
            average.sums.copy_(part[place])
        return True

    def clear(self) -> None:
        """Forgets everything."""
        self._gains, self._measured, self.count = np.zeros(len(self.kinds)), 0, 0
        for average in self.parts:
            average.count = 0

    def _gains_of(self, w: Tensor, r: Tensor, rows: slice) -> Tensor:
        means = [average.mean(rows) for average in self.parts]
        return torch.stack([torch.dot(mean[1] + r, mean[0] - w) for mean in means]).double()


class _Average:
    """One running average of w and r.

    Attributes:
        sums: both, [2, rows].
    """

    def __init__(
        self, kind: float, every: int, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._decay = kind**every
        self.sums = torch.zeros((2, rows), dtype=dtype, device=device)
        self.count = 0

    @property
    def nbytes(self) -> int:
        return self.sums.numel() * self.sums.element_size()

    def begin(self) -> None:
        """Makes room for an iterate, which `add` is then given chunk by chunk."""
        if self.count == 0:
            self.sums.zero_()
        self.count += 1

    @property
    def weight(self) -> float:
        """Weight of the newest iterate in the mean."""
        # The plain mean as long as there are too few to fill the horizon.
        return max(1.0 - self._decay, 1.0 / self.count)

    def add(self, w: Tensor, r: Tensor, rows: slice) -> None:
        """Adds rows of an iterate and of its residual."""
        for mean, new in zip(self.sums, (w, r), strict=True):
            mean[rows].lerp_(new, self.weight)

    def mean(self, rows: slice = slice(None)) -> Tensor:
        """The averages of w and r, [2, rows]."""
        return self.sums[:, rows]
