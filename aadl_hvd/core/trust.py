"""How far a jump of the subspace method may go, by the noise and by what became of earlier jumps.

phi is the share of the loss that the iterates' own wobble makes up. Where it is large, the
iteration is near the edge of stability under noise, and a jump would excite it. It needs observed
losses.

psi compares the way of the block means with that of a random walk, which scores 1. It needs none.
It is blind to the edge of stability, as phi is to noise beneath a large loss: both must allow it.

All inputs come out of reductions, so the results are the same on every rank.
"""

from __future__ import annotations

import math

from aadl_hvd.checkpoint.subspace_state import TrustState


class Trust:
    """phi, psi and the trust in jumps.

    Attributes:
        scale: share of a jump that is taken, by what became of the jumps before; 1 at first.
    """

    SMALLEST = 0.02  # of `scale`
    KEPT = 0.7  # of the last share of noise, where it falls; where it rises, it rises at once

    def __init__(self) -> None:
        self.scale = 1.0
        self._phi: float | None = None
        self._psi: float | None = None
        self._slope: float | None = None  # <d, g> of the jump that the next block judges

    def note_noise(self, phi: float | None, psi: float | None) -> None:
        """Takes in a block's share of noise; None: it is not known."""
        # What is far beyond the limits would keep the gate shut for long.
        self._phi = _smoothed(self._phi, phi if phi is None else min(phi, 1.0))
        self._psi = _smoothed(self._psi, psi if psi is None else min(psi, 10.0))

    def noise(self, observed: bool) -> float:
        """phi with observed losses, else psi; NaN: unknown."""
        known = self._phi if observed else self._psi
        return math.nan if known is None else known

    def fraction(self, observed: bool) -> float:
        """Share of a jump that noise allows, from 0 to 1; 0 where psi, or phi, is unknown.

        Without observed losses psi decides: 1 up to psi = 0.5, and 0 from 1.5 on. With them phi
        decides as well, 1 up to phi = 0.2 and 0 from 0.4 on, and psi may be larger by 1.
        """
        phi, psi = self.noise(True) if observed else 0.0, self.noise(False)
        if math.isnan(phi) or math.isnan(psi):
            return 0.0
        return max(0.0, min((2.5 if observed else 1.5) - psi, (0.4 - phi) / 0.2, 1.0))

    def farthest(self, observed: bool) -> float:
        """The longest jump, as a share of the way that the block means have gone in all."""
        return 0.5 if observed else 0.3

    def jumped(self, slope: float) -> None:
        """Notes a jump d by its slope <d, g> at the point before it."""
        self._slope = slope

    def judge(self, slope: float) -> None:
        """Judges the last jump by <d, g> in the block after it.

        By the trapezoidal rule the loss has risen along d where the two slopes have a positive sum.
        """
        before, self._slope = self._slope, None
        if before is None or not math.isfinite(slope):
            return
        if before + slope > 0.0:
            self.lower()
        else:
            self.scale = min(2.0 * self.scale, 1.0)

    @property
    def judges(self) -> bool:
        """Whether the next block judges a jump."""
        return self._slope is not None

    def lower(self) -> None:
        """After a jump that made things worse."""
        self.scale = max(0.25 * self.scale, self.SMALLEST)

    def forget_jump(self) -> None:
        """The next block judges nothing."""
        self._slope = None

    def clear(self) -> None:
        """Forgets what belongs to the blocks. The trust stays."""
        self._phi = self._psi = self._slope = None

    def state(self) -> TrustState:
        """All it knows."""
        return TrustState(scale=self.scale, phi=self._phi, psi=self._psi, slope=self._slope)

    def load_state(self, state: TrustState) -> None:
        """Loads what `state` returned."""
        self.scale, self._phi, self._psi = state.scale, state.phi, state.psi
        self._slope = state.slope


def _smoothed(last: float | None, new: float | None) -> float | None:
    if new is None or math.isnan(new):
        return last
    return new if last is None else max(new, Trust.KEPT * last + (1.0 - Trust.KEPT) * new)
