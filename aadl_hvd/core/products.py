"""Passes over the stored columns: rows of the Gram matrix, and the update.

Each pass reads R and Y once from memory. On a GPU one kernel does it where `kernels` can be used.
Elsewhere torch's operations do it, a chunk of rows at a time (see `chunking`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from aadl_hvd import kernels
from aadl_hvd.core.chunking import chunk_rows, chunks, part_of, total
from aadl_hvd.core.history import History
from aadl_hvd.core.sharding import Sharding


class Products:
    """Products with the columns of one history.

    Args:
        history: its columns are read, and never changed.

    Attributes:
        history: the same.
        use_kernels: whether `kernels` compute the products. It must be the same on every rank:
            results differ by rounding, so weights would differ between groups of ranks.
    """

    def __init__(self, history: History) -> None:
        self.history = history
        self.use_kernels = False

    def inner(
        self, slots: list[int], vector: Tensor, only: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """[R_slots, v]^T R and v^T v over the rows that this rank sums up, in one pass over R.

        One product of matrices does it, whatever the number of slots. A product for each slot would
        read R from memory once and then from the third-level cache, which takes longer.

        Args:
            slots: slots that this rank holds.
            vector: v, [rows], of the history's `work_dtype`.
            only: compute v^T R for these columns only, slots that this rank holds; the other
                entries of that row are then not specified. None: for all columns.

        Returns:
            [len(slots) + 1, len(sharding.slots)] and [], float64, on the device.
        """
        history = self.history
        summed, r = history.sharding.summed, history.r
        indices = history.indices(slots)
        if self.use_kernels:
            return kernels.inner(r, indices, vector, summed)
        few = None if only is None else history.indices(only)
        pieces = list(self._chunks(vector, summed))
        shape = len(pieces), len(indices) + 1, r.shape[0]
        parts = torch.zeros(shape, dtype=history.work_dtype, device=history.device)
        squares = torch.zeros(len(pieces), dtype=history.work_dtype, device=history.device)
        wide = self._wide(vector)
        for part, square, rows in zip(parts, squares, pieces, strict=True):
            columns, piece = _widened(part_of(r, rows), wide), part_of(vector, rows)
            others = _stacked(columns, indices, piece if few is None else None)
            if len(others) == 1:  # as fast as memory; some libraries' product of matrices is not
                torch.mv(columns, others[0], out=part[0])
            elif len(others):
                torch.mm(others, columns.T, out=part[: len(others)])
            for index in few or ():
                torch.dot(columns[index], piece, out=part[-1, index])
            torch.dot(piece, piece, out=square)
        table = parts.sum(dim=0, dtype=torch.float64)
        return table, squares.sum(dtype=torch.float64)

    def update(
        self,
        r: Tensor,
        gamma: Tensor,
        weight: float | Tensor,
        out: Tensor | None = None,
        start: Tensor | None = None,
        relaxation: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """This rank's contribution to u = -W gamma + weight * (r - R gamma), and to u . r.

        The paper's Eq. 4 and 6, with weight = mixing * M.

        Args:
            r: residual, [rows], of the history's `work_dtype`.
            gamma: [depth] float64 on the host.
            weight: one number for all rows, or one for each row, [rows].
            out: where the result goes, [rows]; None: into new memory.
            start: w, [rows]: the result is w + relaxation * u instead of u. For the row layout
                only. None: the result is u.
            relaxation: beta.

        Returns:
            [rows], and u . r over the rows that this rank sums up: [] float64, on the device.
        """
        history = self.history
        own = gamma[list(history.sharding.slots)]
        # Y holds W + c_j R. This is what is wanted only where c_j equals the current weight.
        wanted = 0.0 if isinstance(weight, Tensor) else weight
        missing = (wanted - torch.tensor(history.weights, dtype=torch.float64, device="cpu")) * own
        share = float(history.sharding.counts_replicated)
        out = torch.empty_like(r) if out is None else out
        if self.use_kernels and not (isinstance(weight, Tensor) and missing.any()):
            return out, self._update(r, own, missing, weight, share, out, start, relaxation)
        # One copy, and the host does not wait for it: it has read the source by then.
        moved = torch.stack([own, missing]).to(history.device, non_blocking=True)
        of_columns, in_rest = moved.to(history.work_dtype)
        rest = in_rest if missing.any() else None
        columns_r, columns_y, wide = history.r, history.y, self._wide(r)
        summed, slopes = history.sharding.summed, []
        for rows in self._chunks(r):
            piece, own_r = part_of(out, rows), part_of(r, rows)
            if isinstance(weight, Tensor):
                _subtract(own_r, share, _widened(part_of(columns_r, rows), wide), of_columns, piece)
                piece.mul_(part_of(weight, rows))
                _subtract(piece, 1.0, _widened(part_of(columns_y, rows), wide), of_columns, piece)
            else:
                columns = _widened(part_of(columns_y, rows), wide)
                _subtract(own_r, share * weight, columns, of_columns, piece)
            if rest is not None:
                _subtract(piece, 1.0, _widened(part_of(columns_r, rows), wide), rest, piece)
            # Now, while the chunk is in the cache.
            counted = slice(max(rows.start, summed.start), min(rows.stop, summed.stop))
            if counted.start < counted.stop:
                slopes.append(torch.dot(part_of(out, counted), part_of(r, counted)))
            if start is not None:
                torch.add(part_of(start, rows), piece, alpha=relaxation, out=piece)
        return out, total(slopes, r)

    def _update(
        self,
        r: Tensor,
        own: Tensor,
        missing: Tensor,
        weight: float | Tensor,
        share: float,
        out: Tensor,
        start: Tensor | None,
        relaxation: float,
    ) -> Tensor:
        """`update` by a kernel, into `out`. Returns u . r."""
        history = self.history
        each = weight if isinstance(weight, Tensor) else None
        in_r, factor = (own, share) if isinstance(weight, Tensor) else (missing, share * weight)
        factors = torch.tensor([factor, relaxation], dtype=torch.float64, device="cpu")
        # One copy to the device.
        numbers = torch.cat([own, in_r, factors]).to(history.work_dtype)
        moved, m = numbers.to(history.device, non_blocking=True), len(own)
        in_y, of_r, factors = moved[:m], moved[m : 2 * m], moved[2 * m :]
        with_r = each is not None or bool(missing.any())
        return kernels.update(
            *(r, in_y, history.y, factors, history.sharding.summed, out),
            in_r=of_r if with_r else None,
            columns=history.r if with_r else None,
            weight=each,
            start=start,
        )

    @property
    def _narrow(self) -> bool:
        """Whether columns are stored in another dtype than the one of the products."""
        return self.history.dtype != self.history.work_dtype

    def _wide(self, vector: Tensor) -> Tensor | None:
        """Memory for a chunk of columns in `work_dtype`; None where no conversion is needed.

        Allocated once a pass. One allocation a chunk left gaps of 0.8 GB in the C library's heap.
        """
        if not self._narrow:
            return None
        longest = max((len(vector[rows]) for rows in self._chunks(vector)), default=0)
        return vector.new_empty((self.history.r.shape[0], longest))

    def _chunks(self, vector: Tensor, part: slice = slice(None)) -> Iterable[slice]:
        return chunks(vector, part, self._narrow)


def working_bytes(
    sharding: Sharding,
    dtype: torch.dtype,
    work_dtype: torch.dtype,
    device: torch.device,
    fresh: int,
) -> int:
    """The most bytes that a pass over the columns takes for a moment, beside the history.

    Args:
        sharding: which rows and slots are this rank's.
        dtype: of the stored columns.
        work_dtype: of the products.
        device: where the history is.
        fresh: the most columns that are multiplied with all columns in one pass.
    """
    rows, columns = sharding.rows[1] - sharding.rows[0], len(sharding.slots)
    narrow = dtype != work_dtype
    size = chunk_rows(device, narrow)
    longest = min(rows, size)
    tables = -(-rows // size) * (fresh + 1)
    if device.type != "cpu":
        tables = max(tables, kernels.PROGRAMS * (kernels.AT_ONCE + 1))
    widened = columns * longest if narrow else 0
    stacked = (fresh + 1) * longest
    return (widened + stacked + tables * columns) * work_dtype.itemsize


def _widened(columns: Tensor, memory: Tensor | None) -> Tensor:
    """Columns [k, rows] in the dtype of the products, in `memory` where they are converted."""
    return columns if memory is None else memory[:, : columns.shape[1]].copy_(columns)


def _stacked(columns: Tensor, indices: list[int], vector: Tensor | None) -> Tensor:
    """Some of the columns [k, rows], and a vector [rows] below them: [len(indices) (+ 1), rows].

    It is a view where that is possible. New columns lie one after another, unless the ring has
    begun anew between them.
    """
    if vector is None:
        first = indices[0] if indices else 0
        if indices == list(range(first, first + len(indices))):
            return columns[first : first + len(indices)]
    elif not indices:
        return vector.unsqueeze(0)
    below = [] if vector is None else [vector]
    return torch.stack([*(columns[index] for index in indices), *below])


def _subtract(r: Tensor, factor: float, columns: Tensor, weights: Tensor, out: Tensor) -> None:
    """factor * r - columns^T weights into `out` [rows], which may be r; columns: [k, rows]."""
    torch.addmv(r, columns.T, weights, beta=factor, alpha=-1.0, out=out)
