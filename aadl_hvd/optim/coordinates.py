"""Chosen coordinates of some tensors, read with few calls of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadl_hvd import kernels

# A tensor of so many numbers takes as long to copy as a call that picks some of them.
_SMALL = 2**13
_WHOLE = 2**18  # numbers that are copied, the smallest tensors first


class Coordinates:
    """Where chosen rows of a flat vector lie in the tensors that it is made of.

    Small tensors are copied whole into one buffer, and their numbers are picked from there: two
    calls for all of them. Each large tensor takes a call of its own.

    Args:
        sizes: number of elements of each tensor, in the order of the flat vector.
        chosen: rows of the flat vector, ascending, int64 [k], on the host.
        device: where the tensors are.

    Attributes:
        met: indices of the tensors that have a chosen row. All other lists follow this order.
        parts: the part of [k] that comes from each of these tensors.
    """

    def __init__(self, sizes: Sequence[int], chosen: Tensor, device: torch.device) -> None:
        firsts = np.cumsum([0, *sizes])
        bounds = np.searchsorted(chosen.numpy(), firsts)
        self.met = [i for i in range(len(sizes)) if bounds[i] < bounds[i + 1]]
        self.parts = [slice(int(bounds[i]), int(bounds[i + 1])) for i in self.met]
        self._counts = [part.stop - part.start for part in self.parts]
        self._sizes = [sizes[i] for i in self.met]
        offsets = [
            chosen[part] - int(firsts[i]) for i, part in zip(self.met, self.parts, strict=True)
        ]
        self._everything = [*map(int.__eq__, self._counts, self._sizes)]
        self._offsets = [own.to(device) for own in offsets]
        self._small = self._smallest()
        self._large = sorted({*range(len(self.met))} - {*self._small})
        self._choose_in_buffer(offsets, device)
        self._buffer: Tensor | None = None
        self._views: list[Tensor] = []  # of the buffer, for the small tensors there are
        self._formats: Any = None  # that the views are made for
        self._gather: kernels.Gather | None = None
        if kernels.usable(device) and self.met:
            tensors = torch.from_numpy(np.repeat(np.arange(len(self.met)), self._counts))
            self._gather = kernels.Gather(tensors, torch.cat(offsets), device)

    def read(self, tensors: Sequence[Tensor | None], out: Tensor) -> Tensor:
        """Reads all chosen rows. To be called under `torch.no_grad`.

        Args:
            tensors: one for each in `met`; None reads as zeros.
            out: [k], float32 or float64, always the same dtype; others are converted.
        """
        if self._gather is not None and self._gather.read(tensors, out):
            return out
        if self._small:
            self._read_small([tensors[i] for i in self._small], out)
        if self._large:
            parts = out.split_with_sizes(self._counts)
            for i in self._large:
                self.read_one(i, tensors[i], parts[i])
        return out

    def read_one(self, index: int, tensor: Tensor | None, out: Tensor) -> Tensor:
        """Reads the chosen rows of one tensor.

        Args:
            index: of the tensor in `met`.
            tensor: None reads as zeros.
            out: this tensor's part of [k].
        """
        if tensor is None:
            return out.zero_()
        values = _in_memory(tensor.detach() if tensor.requires_grad else tensor)
        if self._everything[index]:
            return out.copy_(values.reshape(-1))
        chosen = self._offsets[index]
        if values.dtype != out.dtype:
            return out.copy_(values.reshape(-1)[chosen])
        # One kernel instead of two or more. Each function is the faster one on its device.
        if values.device.type == "cpu":
            return torch.index_select(values.reshape(-1), 0, chosen, out=out)
        return torch.take(values, chosen, out=out)

    def _smallest(self) -> list[int]:
        """Those that are copied whole, in the order of `met`."""
        small = (i for i, size in enumerate(self._sizes) if size <= _SMALL)
        by_size = sorted(small, key=self._sizes.__getitem__)
        ends = np.cumsum([self._sizes[i] for i in by_size])
        return sorted(by_size[: int(np.searchsorted(ends, _WHOLE, side="right"))])

    def _choose_in_buffer(self, offsets: list[Tensor], device: torch.device) -> None:
        """Where chosen rows of the small tensors are in the buffer, and where they go in [k]."""
        small = self._small
        starts = np.cumsum([0, *(self._sizes[i] for i in small)])
        self._length = int(starts[-1])
        self._from = self._to = None
        if not all(self._everything[i] for i in small):
            moved = [offsets[i] + int(start) for i, start in zip(small, starts, strict=False)]
            self._from = torch.cat(moved).to(device)
        if self._large:
            rows = [np.arange(self.parts[i].start, self.parts[i].stop) for i in small]
            self._to = torch.from_numpy(np.concatenate([*rows, np.empty(0, int)])).to(device)

    def _read_small(self, tensors: list[Tensor | None], out: Tensor) -> None:
        if self._buffer is None:
            self._buffer = out.new_empty(self._length)
        buffer = self._buffer
        absent = [tensor is None for tensor in tensors]
        strided = torch.strided
        found = [t if t.layout is strided else t.to_dense() for t in tensors if t is not None]
        formats = absent, [t.shape for t in found], [*map(Tensor.stride, found)]
        if formats != self._formats:
            pieces = buffer.split_with_sizes([self._sizes[i] for i in self._small])
            present = [piece for piece, no in zip(pieces, absent, strict=True) if not no]
            self._views, self._formats = [*map(_in_order_of, found, present)], formats
        if len(found) < len(tensors):
            buffer.zero_()
        if found:
            torch._foreach_copy_(self._views, found)
        if self._to is not None:
            values = buffer if self._from is None else buffer.index_select(0, self._from)
            out.index_copy_(0, self._to, values)
        elif self._from is None:
            out.copy_(buffer)
        else:
            torch.index_select(buffer, 0, self._from, out=out)


def _in_memory(tensor: Tensor) -> Tensor:
    """A view in the order of the memory, so that nothing has to be copied."""
    if tensor.layout is not torch.strided:
        return tensor.to_dense()
    return tensor.permute(0, 2, 3, 1) if _channels_last(tensor) else tensor


def _in_order_of(tensor: Tensor, piece: Tensor) -> Tensor:
    """A view of `piece`, whose order is that of `_in_memory`, in the shape of the tensor."""
    if not _channels_last(tensor):
        return piece.view(tensor.shape)
    n, c, h, w = tensor.shape
    return piece.view(n, h, w, c).permute(0, 3, 1, 2)


def _channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
