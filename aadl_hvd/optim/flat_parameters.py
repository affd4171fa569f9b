"""Parameters seen as one flat vector, which is read and written with few calls of torch."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from aadl_hvd.optim.flatten import FlatLayout

# Numbers that one call copies on a processor. With more the copies take the time, not the calls,
# and each is better shared by all cores.
_FEW = 2**20
_DTYPE = operator.attrgetter("dtype")


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
        self._views: list[Tensor] = []
        dtypes = {p.dtype for p in tensors}
        self._few = layout.n <= _FEW
        host = self._few and all(p.device.type == "cpu" for p in tensors)
        self._joined = dtypes.pop() if host and len(dtypes) == 1 else None

    def in_place(self) -> bool:
        """Whether they lie where they lay when this was made, each in one piece.

        A storage may be replaced at any time, as by `model.half()` or `p.data = ...`.
        """
        if self._memory is None or self._memory != self._where():
            return False
        return all(map(Tensor.is_contiguous, self._tensors))

    def read(
        self, lo: int, hi: int, out: Tensor, again: bool = False, in_place: bool | None = None
    ) -> Tensor:
        """Copies rows [lo, hi) into `out`, see `FlatLayout.read`.

        Args:
            lo: first row.
            hi: row after the last.
            out: [hi - lo].
            again: see `FlatLayout.read`.
            in_place: what `in_place` returns now; None: not known.
        """
        if hi - lo < self._layout.n or not (self.in_place() if in_place is None else in_place):
            return self._layout.read(self._tensors, lo, hi, out, again)
        if self._joined == out.dtype:
            return torch.cat(self._as_vectors(), out=out)
        torch._foreach_copy_(self._layout.split(out), self._as_vectors())
        return out

    def write(self, flat: Tensor, lo: int = 0) -> None:
        """Copies rows of the flat vector from `lo` on, see `FlatLayout.write`."""
        if lo == 0 and flat.numel() >= self._layout.n and self.in_place():
            torch._foreach_copy_(self._as_vectors(), self._layout.split(flat))
        else:
            self._layout.write(self._tensors, flat, lo)

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
