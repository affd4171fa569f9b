"""Tensors whose scale does not matter, such as the weights in front of a batch normalization.

If the loss does not depend on the length of a tensor w, its gradient g is orthogonal to it, in
every mini-batch. A longer w does not lower the loss, but makes all later steps relatively shorter.
So a jump must not make these tensors longer: what points outward along w is taken off.

The angle between w and g tells them. With N numbers the cosine of a random gradient is about
1 / sqrt(N), which is small, too. So the cosine has to be far below that in every look.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aadl_hvd.checkpoint.subspace_state import InvarianceState
from aadl_hvd.core.chunking import chunks
from aadl_hvd.core.sharding import Sharding
from aadl_hvd.core.solve import Vector

SUMS = 4  # numbers for each tensor: ||w||^2, <w, g>, ||g||^2 and <w, d>


class ScaleInvariance:
    """Finds the tensors whose scale does not matter, and corrects jumps.

    Args:
        sharding: this rank's rows; the row layout.
    """

    LOOKS = 4  # before anything is corrected
    LARGEST = 1e-3  # |cos(w, g)|; the eps of a batch normalization leaves less, bfloat16 too
    OF_RANDOM = 0.1  # the same, in units of 1 / sqrt(N)

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        self._looks = 0
        self._largest: Vector | None = None  # cos^2 over what is allowed, [tensors], of all looks
        self._shares: Vector = np.zeros(0)

    @property
    def looks(self) -> bool:
        """Whether the next jump is looked at: not where no tensor can be one of these."""
        return self._largest is None or bool((self._largest < 1.0).any())

    def sums(self, sizes: Sequence[int], w: Tensor, g: Tensor, d: Tensor) -> Tensor:
        """Sums over own rows, for each tensor.

        Args:
            sizes: how many numbers each tensor has, in the order of the flat vector.
            w: iterate, [rows].
            g: its gradient or minus that, without weight decay, [rows].
            d: the jump, [rows].

        Returns:
            [tensors * SUMS] float64, on the device.
        """
        found = torch.zeros(len(sizes), SUMS, dtype=torch.float64, device=w.device)
        for rows in chunks(w, self._sharding.counted, widened=True):
            first, lengths = self._met(sizes, rows, w.device)
            x, y, z = (vector[rows].double() for vector in (w, g, d))
            products = torch.stack([x * x, x * y, y * y, x * z], dim=1)
            sums = torch.segment_reduce(products, "sum", lengths=lengths, axis=0, unsafe=True)
            found[first : first + len(lengths)] += sums
        return found.reshape(-1)

    def look(self, sizes: Sequence[int], sums: Vector) -> bool:
        """Takes in the sums over all ranks.

        Returns:
            Whether `correct` changes the jump.
        """
        ww, wg, gg, wd = sums.reshape(-1, SUMS).T
        sides = ww * gg
        known = sides > 0.0
        allowed = np.minimum(self.LARGEST**2, self.OF_RANDOM**2 / np.maximum(sizes, 1))
        cosines = np.where(known, wg**2 / np.where(known, sides, 1.0), 1.0) / allowed
        if self._largest is None or len(self._largest) != len(sizes):  # loaded, of other tensors
            self._looks, self._largest = 0, cosines
        self._looks, self._largest = self._looks + 1, np.maximum(self._largest, cosines)
        outward = (self._largest < 1.0) & (wd > 0.0) & (self._looks >= self.LOOKS)
        self._shares = np.where(outward, wd / np.where(outward, ww, 1.0), 0.0)
        return bool(outward.any())

    def correct(self, sizes: Sequence[int], w: Tensor, d: Tensor) -> None:
        """Takes off the jump d, in place, what points outward along the tensors found.

        Args:
            sizes: see `sums`.
            w: iterate, [rows].
            d: the jump, [rows].
        """
        shares = torch.from_numpy(self._shares).to(w.device, w.dtype)
        for rows in chunks(w, widened=True):
            first, lengths = self._met(sizes, rows, w.device)
            own = shares[first : first + len(lengths)].repeat_interleave(lengths)
            d[rows].addcmul_(own, w[rows], value=-1.0)

    def clear(self) -> None:
        """Forgets what was found."""
        self._looks, self._largest = 0, None

    def state(self) -> InvarianceState:
        """All it knows."""
        largest = () if self._largest is None else tuple(self._largest.tolist())
        return InvarianceState(looks=self._looks, largest=largest)

    def load_state(self, state: InvarianceState) -> None:
        """Loads what `state` returned."""
        self._looks = state.looks
        self._largest = np.array(state.largest) if state.looks else None

    def _met(self, sizes: Sequence[int], rows: slice, device: torch.device) -> tuple[int, Tensor]:
        """The first tensor that has numbers in own rows, and how many each from it on has there."""
        lo = self._sharding.rows[0]
        begin, end, ends = lo + rows.start, lo + rows.stop, np.cumsum(sizes)
        first = int(np.searchsorted(ends, begin, side="right"))
        last = int(np.searchsorted(ends, end, side="left"))
        lengths = np.diff(np.minimum(ends[first : last + 1], end), prepend=begin)
        return first, torch.from_numpy(lengths).to(device)
