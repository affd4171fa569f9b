"""Running averages of the weights for evaluation, on one rank's rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aadl_hvd import kernels
from aadl_hvd.checkpoint.shard_state import AveragesState
from aadl_hvd.core.captures import Captures, none, where
from aadl_hvd.core.chunking import chunks, part_of
from aadl_hvd.core.solve import Vector


class WeightAverages:
    """Running exponential averages of the iterates. Training does not use them.

    There can be several, each with a decay factor per step. They take in an iterate in each
    acceleration step, where the rows are at hand anyway. Each averages the residuals too. If the
    loss is quadratic and r is minus its gradient, then

        f(w) - f(avg w) = 1/2 <r + avg r, avg w - w>

    by the trapezoidal rule. So the gain of every average is known without a forward pass, up to
    noise. The noise is smoothed over about 20 steps. Memory: 2 * rows numbers for each average.

    Args:
        decays: decay factors per step, in (0, 1).
        every: number of steps between two calls of `push`.
        rows: number of rows of this rank.
        dtype: float32 or float64.
        device: where the parameters are.
        captures: runs device work; None: one operation at a time.

    Attributes:
        decays: the decay factors.
        use_kernels: whether `kernels` do the work. It must be the same on every rank: results
            differ by rounding, so averages would differ between groups of ranks.
        count: number of iterates taken in.
        summed: gains [len(decays)] of the last reduction.

    Implements `reduction.Payload`.
    """

    part = "average"
    SMOOTHING = 0.95  # of the gains, per step

    def __init__(
        self,
        decays: Sequence[float],
        every: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        captures: Captures | None = None,
    ) -> None:
        self.decays = tuple(decays)
        self._every = every
        self._means = torch.zeros((len(self.decays), 2, rows), dtype=dtype, device=device)  # w, r
        self.use_kernels = False
        self._captures = captures or none()
        self._gains: Vector = np.zeros(len(self.decays))
        self._measured = self.count = 0
        self.summed: Vector = np.zeros(len(self.decays))
        self._iterate: tuple[Tensor, Tensor, slice]
        self._weighed: tuple[list[float], Tensor] = [], self._means  # the last weights, [decays, 1]

    @property
    def nbytes(self) -> int:
        """Bytes allocated on this rank."""
        return self._means.numel() * self._means.element_size()

    @property
    def gains(self) -> dict[float, float]:
        """f(w) - f(avg w) of each average as measured, the same on every rank; NaN: unknown."""
        weight = 1.0 - self.SMOOTHING ** (self._every * self._measured)
        gains = self._gains / weight if weight else np.full(len(self.decays), np.nan)
        return dict(zip(self.decays, gains.tolist(), strict=True))

    def partial_gains(self, w: Tensor, r: Tensor, part: slice = slice(None)) -> Tensor:
        """This rank's contribution to the gains at an iterate, to be summed over ranks.

        Before the first `push` there is nothing to compare with: all are 0, or NaN if w is not
        finite.

        Args:
            w: the iterate, [rows].
            r: its residual, [rows].
            part: the rows that count.

        Returns:
            [len(decays)] float64, on the device.
        """
        if not self.decays:
            return torch.empty(0, dtype=torch.float64, device="cpu")
        if not self.count:  # `push` needs to know whether w is finite
            if not w.numel():
                return w.new_zeros(len(self.decays), dtype=torch.float64)
            least, largest = torch.aminmax(w)  # unlike w.abs() it takes no memory
            return (0.0 * least + 0.0 * largest).double().expand(len(self.decays))
        # 1/2 <r + avg r, avg w - w>
        if self.use_kernels:
            first, end, _ = part.indices(w.numel())
            return kernels.gains(w, r, [*self._means], slice(first, end)).mul_(0.5)
        count, pieces = len(self.decays), [*chunks(w, part, vectors=len(self.decays))]
        longest = max((rows.stop - rows.start for rows in pieces), default=0)
        # Once for all chunks: a few numbers that are kept from each chunk, and large memory that is
        # not, left gaps of 3 n/P numbers in the C library's heap.
        memory, parts = w.new_empty(2, count, longest), w.new_empty(len(pieces), count)
        for rows, out in zip(pieces, parts, strict=True):
            of_w, of_r = part_of(self._means, rows).unbind(1)
            r_sum, w_difference = memory[..., : rows.stop - rows.start]
            torch.add(of_r, part_of(r, rows), out=r_sum)
            torch.sub(of_w, part_of(w, rows), out=w_difference)
            torch.sum(r_sum.mul_(w_difference), dim=1, out=out)
        return parts.sum(dim=0, dtype=torch.float64).mul_(0.5)

    def of(self, w: Tensor, r: Tensor, part: slice) -> WeightAverages:
        """Measures the gains at an iterate in the next reduction; see `partial_gains`."""
        self._iterate = w, r, part
        return self

    def pending(self) -> list[Tensor]:
        """This rank's contribution to the gains, on the device."""
        w, r, part = self._iterate
        if not (self._captures.used and self.count and self.decays) or self.use_kernels:
            return [self.partial_gains(w, r, part)]
        r = self._captures.steady("r", r)
        key = where(w, r, self._means), part.start, part.stop
        return [self._captures.run(lambda: self.partial_gains(w, r, part), "gains", key)]

    def pack(self, numbers: list[Vector]) -> Vector:
        """[len(decays)] numbers to be summed over ranks."""
        return numbers[0]

    def unpack(self, sums: Vector, size: int) -> None:
        """Takes in their sums."""
        self.summed = sums
        del self._iterate  # between steps nothing here keeps it alive

    def push(self, w: Tensor, r: Tensor, gains: Vector) -> None:
        """Takes in an iterate, its residual and its gains, unless these are not finite.

        Args:
            w: the iterate, [rows].
            r: its residual, [rows].
            gains: what `partial_gains` returned for them, summed over ranks; [len(decays)].
        """
        if not np.isfinite(gains).all():
            return
        self.take(w, r)
        if self.count > 1:
            self.note_gains(gains)

    def note_gains(self, gains: Vector) -> None:
        """Takes in gains as summed over ranks, [len(decays)] and finite, of an iterate now."""
        kept = self.SMOOTHING**self._every
        self._gains = kept * self._gains + (1.0 - kept) * gains
        self._measured += 1

    def take(self, w: Tensor, r: Tensor, steps: int | None = None) -> None:
        """Takes in an iterate and its residual, without gains.

        Args:
            w: the iterate, [rows].
            r: its residual, [rows].
            steps: since the last iterate; None: `every`.
        """
        if self.count == 0:
            self._means.zero_()
        self.count += 1
        weights = self._weights(steps or self._every)
        if not self.decays:
            return
        if self.use_kernels:
            kernels.add_to_means(w, r, [*self._means], weights)
            return
        # One call for all averages: with few rows calls take the time.
        if weights != self._weighed[0]:
            column = torch.tensor(weights, dtype=w.dtype, device="cpu").unsqueeze(1)
            if self._captures.used and self._weighed[1].shape == column.shape:
                # A graph reads the weights where they lay when it was captured.
                self._weighed = weights, self._weighed[1].copy_(column, non_blocking=True)
            else:
                self._weighed = weights, column.to(w.device, non_blocking=True)
        column = self._weighed[1]
        r = self._captures.steady("r", r)
        key = where(w, r, column, self._means) if self._captures.used else ()
        self._captures.run(lambda: self._take(w, r, column), "take", key)

    def _take(self, w: Tensor, r: Tensor, column: Tensor) -> None:
        both = self._means.unbind(1)
        for rows in chunks(w):
            for means, new in zip(both, (w, r), strict=True):
                part_of(means, rows).lerp_(part_of(new, rows), column)

    def mean(self, decay: float) -> Tensor | None:
        """This rank's rows of an average, [rows]; None if no iterate has been taken in."""
        return self._means[self.decays.index(decay), 0] if self.count else None

    def state(self) -> AveragesState:
        """All it knows, with this rank's rows of the averages copied to the host."""
        return AveragesState(
            decays=self.decays,
            every=self._every,
            gains=tuple(self._gains.tolist()),
            measured=self._measured,
            count=self.count,
            means=self._means.to("cpu", copy=True) if self.count else None,
        )

    def load_state(self, state: AveragesState) -> bool:
        """Loads what `state` returned.

        Returns:
            Whether it contains all these averages; if not, all begin anew.
        """
        self.clear()
        known = state.every == self._every and set(self.decays) <= set(state.decays)
        if not known or state.means is None:
            return known
        indices = [state.decays.index(decay) for decay in self.decays]
        self._gains = np.array(state.gains, dtype=np.float64)[indices]
        self._measured, self.count = state.measured, state.count
        for means, index in zip(self._means, indices, strict=True):
            means.copy_(state.means[index])
        return True

    def clear(self) -> None:
        """Forgets everything."""
        self._gains, self._measured, self.count = np.zeros(len(self.decays)), 0, 0

    def _weights(self, steps: int) -> list[float]:
        """Weight of the newest iterate in each mean."""
        # A plain mean as long as there are too few iterates for the decay factor.
        return [max(1.0 - decay**steps, 1.0 / self.count) for decay in self.decays]
