"""How noisy the mean gradient is, and whether a residual stands out of the noise.

There are S samples of one gradient, from ranks or from the micro-batches of one rank. Each deviates
from their mean by d_i = g_i - mean(g). The variance of the mean is measured from how the deviations
change between two successive steps:

    sigma^2 = (1/S) mean_i ||d_i(k) - d_i(k-1)||^2 / (2 (1 - 1/S))

If ranks share out a full batch, d_i is large but constant, and that is not noise. It is not quite
constant, because the samples also differ in their Hessians: d_i changes by (H_i - H) dw. Noise is
new in every acceleration step, whereas that change is much like the one before. So the part that
repeats is subtracted.

Where a sample of coordinates is looked at, its noise is measured against its own square, and that
is known exactly: sigma^2 is the ratio times ||g||^2. Tensors differ much less in this ratio than in
either number.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import torch
from torch import Tensor

from aadl_hvd.checkpoint.shard_state import NoiseState, OwnNoiseState
from aadl_hvd.core.fixed_point import Deviations
from aadl_hvd.core.solve import Matrix, Vector


class NoiseMeter:
    """Turns the deviations of successive steps into sigma^2.

    Implements `reduction.Payload`. After `note` and a reduction, `measurement` is that of the last
    two steps, or None.
    """

    part = "noise"
    PAYLOAD = 5  # numbers in the payload
    # Two changes count as alike from this squared cosine on. Independent noise has 1 over its
    # effective dimension on average, measured 0.05 to 0.1. Full batches have 0.4 to 0.8.
    ALIKE = 0.6
    MEMORY = 0.9  # decay of the share of noise, per acceleration step
    GUESSES = NoiseState.GUESSES

    def __init__(self) -> None:
        self.copies = 1  # ranks that read the same rows of the gradient
        self._sums: tuple[Vector, int] | None = None  # of the last reduction
        self._share: float | None = None
        self._open = 0
        self._now: Deviations | None = None
        self._last: Deviations | None = None
        self._changes: deque[tuple[int, Tensor]] = deque(maxlen=2)
        self._call = -1

    def note(self, deviations: Deviations | None, call: int) -> None:
        """Takes in the deviations of a step.

        Args:
            deviations: None if this rank has none.
            call: number of the step.
        """
        successive = self._call == call - 1
        self._last = self._now if successive else None
        self._now, self._call = deviations, call

    def pending(self) -> list[Tensor]:
        """[2] or [3] float64 on the device; [0] if this rank cannot say."""
        deviations, last = self._now, self._last
        if deviations is None or last is None or last.values.shape != deviations.values.shape:
            return [torch.empty(0, device="cpu")]
        change = deviations.values - last.values
        # Two changes that share a step share its noise, and would look alike.
        apart = [earlier for call, earlier in self._changes if call <= self._call - 2]
        before = apart[-1] if apart else None
        self._changes.append((self._call, change))
        squares = change.square().sum(dim=1, dtype=torch.float64)
        if before is not None and before.shape == change.shape:
            alike = (change * before).sum(dim=1, dtype=torch.float64).square()
            alike /= squares * before.square().sum(dim=1, dtype=torch.float64)
            squares = torch.where(alike > self.ALIKE, squares * (1.0 - alike), squares)
        found = [squares.sum(), deviations.squared.double()]
        if deviations.rows is not None:
            found.append(deviations.rows.double())
        return [torch.stack(found)]

    def pack(self, numbers: list[Vector]) -> Vector:
        """[PAYLOAD] numbers to be summed over ranks; zeros if this rank cannot say."""
        if self._now is None or not len(numbers[0]):
            return np.zeros(self.PAYLOAD)
        changed, squared, *rows = numbers[0]
        samples, exact = len(self._now.values), sum(rows) / self.copies
        return np.array([changed, samples, samples**2, squared, exact], dtype=np.float64)

    def unpack(self, sums: Vector, size: int) -> None:
        """Takes in their sums."""
        self._sums = sums, size

    @property
    def measurement(self) -> tuple[float, float] | None:
        """sigma^2 and the square of the gradient's norm, see `variance`; the same on every rank."""
        return None if self._sums is None else self.variance(*self._sums)

    @staticmethod
    def variance(sums: Vector, size: int) -> tuple[float, float] | None:
        """sigma^2 of the mean gradient, and the square of the gradient's norm.

        Args:
            sums: of `pack` over ranks, [PAYLOAD].
            size: number of ranks.

        Returns:
            None if a rank could not say, if there is one sample only, or if the coordinates that
            were looked at have no gradient while others have.
        """
        changed, samples, squares, squared, exact = (float(x) for x in sums)
        if samples < 2 or squares * size != samples**2:
            return None
        variance, squared = changed / samples**2 / (2.0 * (1.0 - 1.0 / samples)), squared / size
        if exact == 0.0:  # all coordinates were looked at
            return variance, squared
        return None if squared == 0.0 else (variance / squared * exact, exact)

    def steadied(self, variance: float, squared: float) -> float:
        """sigma^2, but not less than its recent share of ||r||^2.

        A single measurement of few samples can be too low by a factor, and in thousands of
        acceleration steps some are. The share is the same on every rank, and a reset keeps it.

        Args:
            variance: sigma^2 as measured.
            squared: square of the norm that it is measured against.
        """
        if math.isfinite(variance) and 0.0 < squared < math.inf:
            share = min(variance / squared, 1.0)
            last = share if self._share is None else self._share
            self._share = self.MEMORY * last + (1.0 - self.MEMORY) * share
        return max(variance, (self._share or 0.0) * squared)

    def stays_open(self, opens: bool) -> bool:
        """Whether a gate that goes by a guess has been open in `GUESSES` attempts in a row.

        A guess is too low now and then. In hundreds of attempts under noise some would get through.

        Args:
            opens: whether this attempt's guess opens it.
        """
        self._open = min(self._open + 1, self.GUESSES) if opens else 0
        return self._open == self.GUESSES

    def state(self) -> NoiseState:
        """What is the same on every rank."""
        return NoiseState(share=self._share, open=self._open)

    def own_state(self) -> OwnNoiseState:
        """What this rank's own gradients deviated by, copied to the host."""
        now = None if self._now is None else (self._now.values.cpu(), self._now.squared.cpu())
        changes = tuple((call, change.cpu()) for call, change in self._changes)
        return OwnNoiseState(call=self._call, now=now, changes=changes)

    def load_state(
        self, state: NoiseState, own: OwnNoiseState | None, device: torch.device
    ) -> None:
        """Loads what `state` returned, and `own_state` on this rank where that is known."""
        self.clear()
        self._share, self._open = state.share, state.open
        if own is None:
            return
        self._call = own.call
        if own.now is not None:
            self._now = Deviations(*(tensor.to(device) for tensor in own.now))
        self._changes.extend((call, change.to(device)) for call, change in own.changes)

    def clear(self) -> None:
        """Forgets all steps."""
        self._now = self._last = None
        self._changes = deque(maxlen=2)


def variance_from_history(gram: Matrix) -> float | None:
    """A rough sigma^2 from the residuals alone, for a single sample.

    Noise that is new in every residual makes successive differences dr_j = r_j - r_(j-1)
    anticorrelated: E <dr_j, dr_(j+1)> = -sigma^2, and E <dr_j, dr_(j+2)> = 0. An oscillating
    iteration makes the first one negative too, but then the second one is positive, and the sum of
    the two is not affected. Medians are used because accelerated steps are outliers.

    A median is as old as half of the columns. Where the iteration is unstable, residuals grow
    within them, and their noise with them. So the guess grows as the last difference has.

    Args:
        gram: R^T R [h, h], columns from the oldest to the newest, of residuals that were stored in
            every step.

    Returns:
        None with fewer than 3 columns.
    """
    if len(gram) < 3:
        return None
    squares, next_one, one_after = (np.diag(gram, apart) for apart in range(3))
    variance = max(0.0, -float(np.median(next_one)) - float(np.median(one_after)))
    usual = float(np.median(squares))
    grown = float(squares[-1]) / usual if usual > 0.0 else 1.0
    return variance * max(1.0, grown)


def stands_out(squared: float, variance: float, gate: float) -> bool:
    """Whether a squared norm exceeds the noise by far: squared - variance > gate * variance.

    Args:
        squared: square of a norm.
        variance: sigma^2.
        gate: `AndersonConfig.noise_gate`.

    Returns:
        False also where a number is NaN.
    """
    return squared - variance > gate * variance
