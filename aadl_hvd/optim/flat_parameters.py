"""Parameters and their gradients as flat vectors, which few calls of torch read and write."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from aadl_hvd.core.chunking import chunks
from aadl_hvd.optim.flatten import FEW, FlatLayout
from aadl_hvd.optim.shards import local

_DTYPE = operator.attrgetter("dtype")
_GRADIENT = operator.attrgetter("grad")


class FlatParameters:
    """Some parameters. Views of them are kept as long as their memory is the same.

    Args:
        tensors: in the order of the flat vector.
        layout: their offsets.
    """

    def __init__(self, tensors: list[Tensor], layout: FlatLayout) -> None:
        self._tensors, self._layout = tensors, layout
        # Other classes, devices and layouts may say nothing of their memory, or the same always.
        plain = all(
            type(p) in (Tensor, torch.nn.Parameter)
            and p.layout is torch.strided
            and (p.data_ptr() or not p.numel())
            for p in tensors
        )
        self._memory = self._where() if plain and tensors else None
        # As in channels_last.
        self._in_pieces = not plain or not all(map(Tensor.is_contiguous, tensors))
        self._views: list[Tensor] = []
        self._dtypes = {p.dtype for p in tensors}
        self._few = layout.n <= FEW
        host = self._few and all(p.device.type == "cpu" for p in tensors)
        self._joined = tensors[0].dtype if host and len(self._dtypes) == 1 else None

    def in_place(self) -> bool:
        """Whether they lie where they lay when this was made, each in one piece.

        A storage may be replaced at any time, as by `model.half()` or `p.data = ...`.
        """
        if self._memory is None or self._memory != self._where():
            return False
        return all(map(Tensor.is_contiguous, self._tensors))

    def stay(self, lo: int, hi: int) -> bool:
        """Whether those that meet rows [lo, hi) lie where they lay, in one piece or not.

        Where views are kept, it looks at addresses alone: if a parameter is another view of the
        same memory now, `read` goes on with the old one, until `in_place` is asked.
        """
        if self._memory is None:
            return False
        addresses, sizes, _ = self._memory
        if hi - lo == self._layout.n:
            if self._few and not self._in_pieces:
                return bool(addresses == [*map(Tensor.data_ptr, self._tensors)])
            if self._memory != self._where():
                return False
            return self._in_pieces or all(map(Tensor.is_contiguous, self._tensors))
        met = [i for i, _, _ in self._layout.segments(lo, hi)]
        found = [self._tensors[i] for i in met]
        seen = [(p.data_ptr(), p.numel()) for p in found]
        return seen == [(addresses[i], sizes[i]) for i in met]

    def read(
        self, lo: int, hi: int, out: Tensor, again: bool = False, in_place: bool | None = None
    ) -> Tensor:
        """Copies rows [lo, hi) into `out`, see `FlatLayout.read`.

        Args:
            lo: first row.
            hi: row after the last.
            out: [hi - lo].
            again: see `FlatLayout.read`.
            in_place: what `in_place` or `stay` returns now; None: not known.
        """
        if in_place is None:
            in_place = self.stay(lo, hi)
        if hi - lo < self._layout.n or self._in_pieces or not in_place:
            return self._layout.read(self._tensors, lo, hi, out, again)
        if self._joined == out.dtype:
            return torch.cat(self._as_vectors(), out=out)
        torch._foreach_copy_(self._layout.split(out), self._as_vectors())
        return out

    def write(self, flat: Tensor, lo: int = 0) -> None:
        """Copies rows of the flat vector from `lo` on, see `FlatLayout.write`."""
        n = self._layout.n
        if lo == 0 and flat.numel() >= n and not self._in_pieces and self.stay(0, n):
            torch._foreach_copy_(self._as_vectors(), self._layout.split(flat))
        else:
            self._layout.write(self._tensors, flat, lo)

    def add(self, flat: Tensor) -> None:
        """Adds a vector [n] to the parameters, computed in its dtype and rounded to theirs."""
        n, plain = self._layout.n, not self._in_pieces and self._dtypes == {flat.dtype}
        if plain and self.stay(0, n):
            torch._foreach_add_(self._as_vectors(), self._layout.split(flat))
            return
        for part in chunks(flat):
            added = flat[part]
            now = self.read(part.start, part.stop, torch.empty_like(added))
            self.write(now.add_(added), part.start)

    def forget_views(self) -> None:
        """Lets go of the views."""
        self._views = []

    def _as_vectors(self) -> list[Tensor]:
        views = self._views or [p.detach().view(-1) for p in self._tensors]
        if self._few:  # they keep a storage alive that has been replaced
            self._views = views
        return views

    def _where(self) -> Any:
        ps = self._tensors
        return [*map(Tensor.data_ptr, ps)], [*map(Tensor.numel, ps)], [*map(_DTYPE, ps)]


class FlatGradients:
    """The gradients of some parameters.

    Args:
        parameters: in the order of the flat vector.
        layout: their offsets.
    """

    def __init__(self, parameters: list[Tensor], layout: FlatLayout) -> None:
        self._parameters, self._layout = parameters, layout

    def read(self, lo: int, hi: int, out: Tensor) -> tuple[Tensor, set[int]]:
        """Copies rows [lo, hi) into `out`, [hi - lo].

        Returns:
            It, and the indices of the parameters that meet these rows and have no gradient. Their
            rows are zeros.
        """
        if hi - lo == self._layout.n:
            found = [*map(_GRADIENT, self._parameters)]
            if {*map(type, found)} == {Tensor}:  # none is missing, or sharded
                if not self._layout.join(found, out):
                    self._layout.read(found, lo, hi, out, again=True)
                return out, set()
        gradients: list[Tensor | None] = [None] * len(self._parameters)
        absent = set()
        for index, _, _ in self._layout.segments(lo, hi):  # at many ranks one or two of all
            gradients[index] = gradient = local(self._parameters[index].grad)
            if gradient is None:
                absent.add(index)
        return self._layout.read(gradients, lo, hi, out, again=True), absent
