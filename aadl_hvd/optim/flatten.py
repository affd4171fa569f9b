"""A list of tensors seen as one flat vector, of which any range of rows can be read or written.

The order inside a tensor is its logical (row-major) order, whatever its strides are, so that
channels_last weights, their gradients and their momentum all line up. Of the tensors nothing is
kept between two calls: the storage of a parameter may be replaced. Views of a flat vector that is
read into are kept, until `forget_views`: with many small tensors they take longer than the copy.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

_LAYOUT = operator.attrgetter("layout")
_KEPT = 8  # ranges and flat vectors that are remembered
# Numbers that one call copies on a processor. With more the copies take the time, not the calls,
# and each is better shared by all cores.
FEW = 2**20


class FlatLayout:
    """Offsets of tensors in the flat vector.

    Args:
        shapes: shape of each tensor, in order.
    """

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self.shapes = tuple(shapes)
        self.offsets = [0]
        self.sizes = [shape.numel() for shape in self.shapes]
        for size in self.sizes:
            self.offsets.append(self.offsets[-1] + size)
        # One call joins vectors. Others need a view each.
        self._not_vectors = [i for i, shape in enumerate(self.shapes) if len(shape) != 1]
        self._found: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        self._views: dict[tuple[int, torch.dtype, int, int], list[Tensor]] = {}

    @property
    def n(self) -> int:
        """Length of the flat vector."""
        return self.offsets[-1]

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The part of each tensor, as a vector, of the first n numbers of a vector."""
        return torch.split_with_sizes(flat[: self.n], self.sizes)

    def segments(self, lo: int, hi: int) -> list[tuple[int, int, int]]:
        """The tensors that meet rows [lo, hi): (index, first row, row after the last)."""
        found = self._found.get((lo, hi))
        if found is None:
            if len(self._found) >= _KEPT:  # as many as rows are read by different callers
                self._found.clear()
            found = self._found[lo, hi] = [*self._segments(lo, hi)]
        return found

    def _segments(self, lo: int, hi: int) -> Iterator[tuple[int, int, int]]:
        index = max(bisect.bisect_right(self.offsets, lo) - 1, 0)
        while index < len(self.shapes) and self.offsets[index] < hi:
            first, last = max(self.offsets[index], lo), min(self.offsets[index + 1], hi)
            if first < last:
                yield index, first, last
            index += 1

    def read(
        self, tensors: Sequence[Tensor | None], lo: int, hi: int, out: Tensor, again: bool = False
    ) -> Tensor:
        """Copies rows [lo, hi) into `out`, converting the dtype; None reads as zeros.

        Args:
            tensors: one for each shape.
            lo: first row.
            hi: row after the last.
            out: [hi - lo].
            again: whether `out` is read into in many steps, so that views of it are worth keeping.
        """
        segments = self.segments(lo, hi)
        if again and len(segments) > 1 and self._reads_whole(tensors, segments):
            key = out.data_ptr(), out.dtype, lo, hi
            views = self._views.get(key)
            if views is None:
                if len(self._views) >= _KEPT:
                    self._views.clear()
                views = self._views[key] = _pieces(out, [t for t in tensors if t is not None])
            torch._foreach_copy_(views, tensors)
            return out
        whole: list[Tensor] = []
        start = 0  # of the whole tensors in `out`, which are copied at once
        for index, first, last in segments:
            tensor = tensors[index]
            if tensor is not None and last - first == tensor.numel():
                if not whole:
                    start = first - lo
                whole.append(tensor.to_dense() if tensor.is_sparse else tensor)
                continue
            _read_whole(whole, out, start)
            whole = []
            # With few rows calls are all there is: no view of what is whole already.
            piece = out[first - lo : last - lo] if last - first < hi - lo else out
            if tensor is None:
                piece.zero_()
                continue
            dense = tensor.to_dense() if tensor.is_sparse else tensor
            piece.copy_(_rows(dense, first - self.offsets[index], last - first))
        _read_whole(whole, out, start)
        return out

    def _reads_whole(
        self, tensors: Sequence[Tensor | None], segments: list[tuple[int, int, int]]
    ) -> TypeGuard[list[Tensor]]:
        """Whether all tensors are there, dense, and read from their first to their last row."""
        if segments[0][1] != 0 or segments[-1][2] != self.n or len(segments) < len(self.shapes):
            return False
        if type(None) in {*map(type, tensors)}:
            return False
        return {*map(_LAYOUT, tensors)} == {torch.strided}

    def join(self, tensors: Sequence[Tensor], out: Tensor) -> bool:
        """Copies all of a few numbers by one call, where that is faster than `read`.

        Nothing is kept of the tensors, so that they may be new ones in every call.

        Args:
            tensors: one for each shape, of the class `Tensor` itself.
            out: [n].

        Returns:
            Whether it did. False: there are many numbers, they are on another device than a
            processor, or a tensor is sparse or of another size. `out` is undefined then.
        """
        if out.numel() > FEW or out.device.type != "cpu" or len(tensors) != len(self.shapes):
            return False
        vectors = [*tensors]
        try:
            for i in self._not_vectors:
                vectors[i] = vectors[i].reshape(self.sizes[i])
            # A view: where sizes are others, torch gives what it writes to another shape.
            joined = torch.cat(vectors, out=out.view(-1))
        except RuntimeError:
            return False
        return joined.numel() == self.n

    def forget_views(self) -> None:
        """Lets go of the flat vectors that were read into."""
        self._views.clear()

    def write(self, tensors: Sequence[Tensor | None], flat: Tensor, lo: int = 0) -> None:
        """Copies rows of the flat vector, from `lo` on, into the tensors; None takes nothing.

        Args:
            tensors: one for each shape.
            flat: [k]; what goes beyond the flat vector's end is not written.
            lo: the row that it begins with.
        """
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        whole: list[Tensor] = []
        start = 0  # of the whole tensors in `flat`, which is cut up for them at once
        for index, first, last in self.segments(lo, lo + flat.numel()):
            tensor = tensors[index]
            if tensor is not None and last - first == tensor.numel():
                if not whole:
                    start = first - lo
                whole.append(tensor)
                continue
            if whole:
                sources += _pieces(flat[start:], whole)
                targets += whole
                whole = []
            if tensor is None:
                continue
            piece, begin = flat[first - lo : last - lo], first - self.offsets[index]
            if tensor.is_contiguous():
                targets.append(_rows(tensor, begin, last - first))
                sources.append(piece)
            else:  # memory in another order than the flat vector's: what it meets of the first axis
                each = tensor.numel() // len(tensor)
                met = tensor[begin // each : -(-(begin + len(piece)) // each)]
                rows = met.contiguous().view(-1)
                begin %= each
                rows[begin : begin + len(piece)] = piece
                met.copy_(rows.view(met.shape))
        if whole:
            sources += _pieces(flat[start:], whole)
            targets += whole
        if targets:
            torch._foreach_copy_(targets, sources)


def _read_whole(tensors: list[Tensor], out: Tensor, start: int) -> None:
    if tensors:
        torch._foreach_copy_(_pieces(out[start:] if start else out, tensors), tensors)


def _rows(tensor: Tensor, first: int, count: int) -> Tensor:
    """Rows [first, first + count) of a dense tensor as a vector."""
    if tensor.is_contiguous():
        return tensor.as_strided((count,), (1,), tensor.storage_offset() + first)
    return tensor.reshape(-1)[first : first + count]


def _pieces(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of a flat vector, one after the other, in the shapes of non-empty tensors.

    One call of torch, where slices and views would be two for every tensor.
    """
    if not like:
        return []
    return list(torch._C._nn.unflatten_dense_tensors(flat, like))
