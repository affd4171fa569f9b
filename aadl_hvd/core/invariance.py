"""Tensors whose scale does not matter, such as the weights in front of a batch normalization.

If the loss does not depend on the length of a tensor w, its gradient g is orthogonal to it, in
every mini-batch. A longer w does not lower the loss, but makes all later steps relatively shorter.
So what points outward along w is taken off a jump. To first order the jump then does not lengthen
w. What points inward stays: it shortens w, as the base optimizer's weight decay does.

The angle between w and g tells them. With N numbers the cosine of a random gradient is about
1 / sqrt(N), which is small, too. So the cosine has to be far below that in every look.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aadl_hvd.checkpoint.subspace_state import InvarianceState
from aadl_hvd.core.chunking import chunks, part_of
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
        self._looks: Vector | None = None  # how many, [tensors]
        self._largest: Vector = np.zeros(0)  # cos^2 over what is allowed, of all looks, [tensors]
        self._shares: Vector = np.zeros(0)
        self._ends: tuple[Sequence[int], Vector] = [], np.zeros(0)
        self._layouts = 0  # how often the sizes have changed
        self._lengths: dict[tuple[int, int, torch.device], tuple[int, Tensor]] = {}

    @property
    def looks(self) -> bool:
        """Whether the next jump is looked at: not where no tensor can be one of these."""
        return self._looks is None or bool((self._largest < 1.0).any())

    def sums(self, sizes: Sequence[int], w: Tensor, g: Tensor, d: Tensor) -> Tensor:
        """Sums over own rows, for each tensor.

        Args:
            sizes: how many numbers each tensor has, in the order of the flat vector.
            w: iterate, [rows].
            g: its gradient or minus that, without weight decay, [rows].
            d: the jump, [rows].

        Returns:
            [SUMS * tensors] float64, on the device.
        """
        found = torch.zeros(SUMS, len(sizes), dtype=torch.float64, device=w.device)
        for rows in chunks(w, self._sharding.counted, widened=True):
            first, lengths = self._met(sizes, rows, w.device)
            x, y, z = torch.stack([part_of(vector, rows) for vector in (w, g, d)]).double()
            products = x.new_empty(SUMS, len(x))
            for out, (a, b) in zip(products, ((x, x), (x, y), (y, y), (x, z)), strict=True):
                torch.mul(a, b, out=out)
            # One vector: on a GPU only sums of vectors are parallel within a segment.
            sums = torch.segment_reduce(products.view(-1), "sum", lengths=lengths, unsafe=True)
            sums = sums.view(SUMS, -1)
            found[:, first : first + sums.shape[1]].add_(sums)  # `+=` would copy it once more
        return found.reshape(-1)

    def layout(self, sizes: Sequence[int]) -> int:
        """A number that is another one whenever the sizes have changed since the last call."""
        if self._ends[0] != sizes:
            self._ends = sizes, np.cumsum(sizes)
            self._lengths.clear()
            self._layouts += 1
        return self._layouts

    def look(self, sizes: Sequence[int], sums: Vector) -> bool:
        """Takes in the sums over all ranks.

        Args:
            sizes: how many numbers each tensor has, on all ranks together.
            sums: what `sums` returned, summed over ranks.

        Returns:
            Whether `correct` changes the jump.
        """
        ww, wg, gg, wd = sums.reshape(SUMS, -1)
        sides = ww * gg
        seen = sides > 0.0  # a layer that is left out now and then says nothing in such a step
        allowed = np.minimum(self.LARGEST**2, self.OF_RANDOM**2 / np.maximum(sizes, 1))
        cosines = np.where(seen, wg**2 / np.where(seen, sides, 1.0), 0.0) / allowed
        if self._looks is None:
            self._looks, self._largest = np.zeros(len(sizes)), np.zeros(len(sizes))
        self._looks, self._largest = self._looks + seen, np.maximum(self._largest, cosines)
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
            own_lengths = lengths[: len(lengths) // SUMS]
            known, count = shares[first : first + len(own_lengths)], rows.stop - rows.start
            own = known.repeat_interleave(own_lengths, output_size=count)
            d[rows].addcmul_(own, w[rows], value=-1.0)

    def clear(self) -> None:
        """Forgets what was found."""
        self._looks, self._largest = None, np.zeros(0)

    def state(self) -> InvarianceState:
        """All it knows."""
        looks = () if self._looks is None else tuple(map(int, self._looks))
        return InvarianceState(looks=looks, largest=tuple(self._largest.tolist()))

    def load_state(self, state: InvarianceState) -> None:
        """Loads what `state` returned."""
        self.clear()
        if state.looks:
            self._looks, self._largest = np.array(state.looks, float), np.array(state.largest)

    def _met(self, sizes: Sequence[int], rows: slice, device: torch.device) -> tuple[int, Tensor]:
        """The first tensor that has numbers in own rows, and how many each from it on has there.

        The latter SUMS times over: [SUMS * tensors met].
        """
        lo = self._sharding.rows[0]
        begin, end = lo + rows.start, lo + rows.stop
        self.layout(sizes)
        ends, key = self._ends[1], (begin, end, device)
        if (found := self._lengths.get(key)) is not None:  # on a GPU the host would wait for a copy
            return found
        first = int(np.searchsorted(ends, begin, side="right"))
        last = int(np.searchsorted(ends, end, side="left"))
        lengths = np.diff(np.minimum(ends[first : last + 1], end), prepend=begin)
        self._lengths[key] = first, torch.from_numpy(np.tile(lengths, SUMS)).to(device)
        return self._lengths[key]
