"""A list of tensors seen as one flat vector, of which any range of rows can be read or written.

The order inside a tensor is its logical (row-major) order, whatever its strides are, so that
channels_last weights, their gradients and their momentum all line up. Nothing is cached: the
storage of a parameter may be replaced between two steps.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class FlatLayout:
    """Offsets of tensors in the flat vector.

    Args:
        shapes: shape of each tensor, in order.
    """

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self.shapes = tuple(shapes)
        self.offsets = [0]
        for shape in self.shapes:
            self.offsets.append(self.offsets[-1] + shape.numel())

    @property
    def n(self) -> int:
        """Length of the flat vector."""
        return self.offsets[-1]

    def segments(self, lo: int, hi: int) -> Iterator[tuple[int, int, int]]:
        """The tensors that meet rows [lo, hi): (index, first row, row after the last)."""
        index = max(bisect.bisect_right(self.offsets, lo) - 1, 0)
        while index < len(self.shapes) and self.offsets[index] < hi:
            first, last = max(self.offsets[index], lo), min(self.offsets[index + 1], hi)
            if first < last:
                yield index, first, last
            index += 1

    def read(self, tensors: Sequence[Tensor | None], lo: int, hi: int, out: Tensor) -> Tensor:
        """Copies rows [lo, hi) into `out` [hi - lo], converting the dtype; None reads as zeros."""
        for index, first, last in self.segments(lo, hi):
            tensor, piece = tensors[index], out[first - lo : last - lo]
            if tensor is None:
                piece.zero_()
                continue
            if tensor.is_sparse:
                tensor = tensor.to_dense()
            if last - first == tensor.numel():
                piece.view(self.shapes[index]).copy_(tensor)
            else:
                start = first - self.offsets[index]
                piece.copy_(tensor.reshape(-1)[start : start + last - first])
        return out

    def write(self, tensors: Sequence[Tensor | None], flat: Tensor) -> None:
        """Copies the flat vector [>= n] into the tensors; None takes nothing."""
        targets, sources = [], []
        for index, tensor in enumerate(tensors):
            if tensor is not None and tensor.numel() > 0:
                lo, hi = self.offsets[index], self.offsets[index + 1]
                targets.append(tensor)
                sources.append(flat[lo:hi].view(self.shapes[index]))
        if targets:
            torch._foreach_copy_(targets, sources)
