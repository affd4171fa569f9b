"""Ring buffer of the columns of R and Y, this rank's part of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from aadl_hvd import kernels
from aadl_hvd.core.sharding import Sharding

# Rows that are worked on at a time: on a processor a vector, 256 KB, stays in the second level of
# the cache while the columns pass by, and the columns, 5 MB, in the third where they are needed
# more than once; on a GPU few launches matter more. float32 sums stay short.
CHUNK = 2**16
CHUNK_GPU = 2**21
# At most, of columns that are widened for it: that takes memory, 4 m bytes a row, beside a history
# whose point is to be small.
CHUNK_WIDE = 2**19


class History:
    """Differences of successive stored pairs (w, r), in slots used round-robin.

    W[j] = w_j - w_(j-1) and R[j] = r_j - r_(j-1), where j counts stored pairs: the columns of the
    paper's Eq. 2 and 3, held as rows of a matrix so that each is contiguous. Both members of a
    pair belong to the same step. What is kept of W is Y[j] = W[j] + c_j R[j], with c_j the weight
    of the residual when the pair was stored: as long as it stays what it is, an update

        -W gamma + c (r - R gamma) = c r - Y gamma

    reads one matrix. Memory on this rank: 2 * len(slots) * rows numbers of `dtype`, and 4 * rows
    numbers of `work_dtype` for the last pair and the next. Allocated at the first `staging_buffer` or `push`.

    Args:
        sharding: which rows and slots are this rank's.
        dtype: of the stored columns.
        work_dtype: of pairs and products, float32 or float64.
        device: where the history is to be.

    Attributes:
        use_kernels: whether `kernels` do products and updates; the same on every rank, or weights of two
            groups would differ by rounding.
        stored: pairs stored since the last reset.
        generation: number of resets.
        fingerprint: names what this rank has loaded and waits to take in, below 2^36; 0 for nothing.
        columns: h, number of columns that can be used: at most depth.
    """

    def __init__(
        self,
        sharding: Sharding,
        dtype: torch.dtype,
        work_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.sharding = sharding
        self.dtype = dtype
        self.work_dtype = work_dtype
        self.device = device
        self.use_kernels = False
        self.stored = 0
        self.generation = 0
        self.fingerprint = 0
        self.columns = 0
        self._index = {slot: i for i, slot in enumerate(sharding.slots)}
        self._weights = [0.0] * len(self._index)  # c_j
        self._y: Tensor | None = None
        self._r: Tensor
        self._pairs: Tensor  # [2, 2, rows], each (w, r)
        self._last = 0  # which of them was stored last; the other is lent

    @property
    def live(self) -> list[int]:
        """Slots of the columns that can be used, from the oldest to the newest."""
        first = self.stored - 1 - self.columns
        return [(first + i) % self.sharding.depth for i in range(self.columns)]

    def keep(self, columns: int) -> None:
        """Forgets all but the newest columns."""
        self.columns = min(self.columns, columns)

    @property
    def nbytes(self) -> int:
        """Bytes allocated on this rank."""
        if self._y is None:
            return 0
        return sum(t.numel() * t.element_size() for t in (self._y, self._r, self._pairs))

    @property
    def version(self) -> tuple[int, ...]:
        """Equal on two ranks where the same pairs were stored since the same reset.

        At most 2^18, so that sums of their squares over 2^16 ranks are exact in float64.
        """
        return self.stored % 1024, self.generation % 1024, *divmod(self.fingerprint, 2**18)

    def index(self, slot: int) -> int | None:
        """Index of a slot in this rank's columns; None where another rank holds it."""
        return self._index.get(slot)

    def staging_buffer(self) -> tuple[Tensor, Tensor]:
        """Memory [rows] of `work_dtype` for the next w and r: `push` takes these without a copy."""
        if self._y is None:
            self._allocate()
        w, r = self._pairs[1 - self._last]
        return w, r

    def scratch(self, *in_use: Tensor) -> Tensor:
        """A vector [rows] that overlaps none in use: lent memory, or new where they lie there."""
        lent, _ = self.staging_buffer()
        taken = any(tensor.data_ptr() == lent.data_ptr() for tensor in in_use)
        return torch.empty_like(lent) if taken else lent

    def push(self, w: Tensor, r: Tensor, weight: float = 0.0) -> tuple[int, Tensor | None] | None:
        """Stores a pair [rows], of `work_dtype`.

        Args:
            w: iterate.
            r: its residual.
            weight: c, what updates will weigh residuals with; 0 where that is no number.

        Returns:
            The slot that was filled, the same on every rank, and with the column layout the new
            column of R [rows], as it was rounded for storage. None for the very first pair, which
            has nothing to differ from.
        """
        next_w, next_r = self.staging_buffer()
        assert self._y is not None
        if w.data_ptr() != next_w.data_ptr():
            next_w.copy_(w)
        if r.data_ptr() != next_r.data_ptr():
            next_r.copy_(r)
        last_w, last_r = self._pairs[self._last]
        self._last = 1 - self._last
        slot = column = None
        if self.stored > 0:
            slot = (self.stored - 1) % self.sharding.depth
            self.columns = min(self.columns + 1, self.sharding.depth)
            if self.sharding.layout == "columns":
                column = torch.empty_like(last_r)
            place = self.index(slot)
            if place is not None:
                self._weights[place] = weight
        for rows in chunks(r) if slot is not None else ():
            # Straight to where it stays; else to the memory of the pair before last, which nobody
            # needs again.
            in_place = place is not None and self.dtype == self.work_dtype
            to_r = self._r[place, rows] if in_place else last_r[rows]
            to_y = self._y[place, rows] if in_place else last_w[rows]
            dr = torch.sub(next_r[rows], last_r[rows], out=to_r)
            if place is not None:
                dw = torch.sub(next_w[rows], last_w[rows], out=to_y)
                if weight:
                    dw.add_(dr, alpha=weight)
            if place is not None and not in_place:
                self._y[place, rows].copy_(dw)
                self._r[place, rows].copy_(dr)
            if column is not None:
                column[rows] = dr.to(self.dtype)
        self.stored += 1
        return None if slot is None else (slot, column)

    def inner(
        self, slots: list[int], vector: Tensor, only: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """[R_slots, v]^T R and v^T v over the rows that this rank sums up.

        One pass over R as the memory sees it: on a processor each product reads a chunk of R, which
        is in the cache after the first.

        Args:
            slots: slots that this rank holds.
            vector: v, [rows].
            only: of v^T R only these columns, slots that this rank holds, are wanted; None: all.

        Returns:
            [len(slots) + 1, len(self.sharding.slots)] and [], float64, on the device.
        """
        places = [self._index[slot] for slot in slots]
        if self.use_kernels:
            return kernels.inner(self._r, places, vector, self.sharding.summed)
        few = None if only is None else [self._index[slot] for slot in only]
        pieces = list(self._chunks(vector, self.sharding.summed))
        shape = len(pieces), len(places) + 1, self._r.shape[0]
        parts = torch.zeros(shape, dtype=self.work_dtype, device=self.device)
        squares = torch.zeros(len(pieces), dtype=self.work_dtype, device=self.device)
        wide = self._wide(vector)
        for part, square, rows in zip(parts, squares, pieces, strict=True):
            columns, piece = _widened(self._r[:, rows], wide), vector[rows]
            others = [*(columns[place] for place in places), *([] if few is not None else [piece])]
            if self.device.type == "cpu":  # BLAS packs narrow matrices, which takes longer
                for out, other in zip(part, others, strict=False):
                    torch.mv(columns, other, out=out)
            elif others:
                torch.mm(torch.stack(others), columns.T, out=part[: len(others)])
            for place in few or ():
                torch.dot(columns[place], piece, out=part[-1, place])
            torch.dot(piece, piece, out=square)
        total = parts.sum(dim=0, dtype=torch.float64)
        return total, squares.sum(dtype=torch.float64)

    def update(
        self,
        r: Tensor,
        gamma: Tensor,
        weight: float | Tensor,
        out: Tensor | None = None,
        start: Tensor | None = None,
        relaxation: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """This rank's part of u = -W gamma + weight * (r - R gamma), and of u . r.

        Args:
            r: residual, [rows].
            gamma: [depth] float64 on the host.
            weight: a number, or one for every row, [rows].
            out: where to, [rows]; None: new memory.
            start: w, [rows], for w + relaxation u in place of u; with the row layout.
            relaxation: beta.

        Returns:
            [rows], and the product over the rows that this rank sums up: [] float64, on the device.
        """
        assert self._y is not None
        own = self._own(gamma)
        # Y holds c_j R, which is what is wanted only where c_j is the weight of now.
        wanted = 0.0 if isinstance(weight, Tensor) else weight
        missing = (wanted - torch.tensor(self._weights, dtype=torch.float64, device="cpu")) * own
        share = float(self.sharding.counts_replicated)
        out = torch.empty_like(r) if out is None else out
        if self.use_kernels and not (isinstance(weight, Tensor) and missing.any()):
            return out, self._update(r, own, missing, weight, share, out, start, relaxation)
        # In one copy, for which the host does not wait: its memory is read before it goes on.
        moved = torch.stack([own, missing]).to(self.device, non_blocking=True).to(self.work_dtype)
        of_columns, in_rest = moved
        rest = in_rest if missing.any() else None
        wide = self._wide(r)
        summed, slopes = self.sharding.summed, []
        for rows in self._chunks(r):
            piece = out[rows]
            if isinstance(weight, Tensor):
                _less(r[rows], share, _widened(self._r[:, rows], wide), of_columns, piece)
                piece.mul_(weight[rows])
                _less(piece, 1.0, _widened(self._y[:, rows], wide), of_columns, piece)
            else:
                _less(r[rows], share * weight, _widened(self._y[:, rows], wide), of_columns, piece)
            if rest is not None:
                _less(piece, 1.0, _widened(self._r[:, rows], wide), rest, piece)
            # While it is in the cache.
            counted = slice(max(rows.start, summed.start), min(rows.stop, summed.stop))
            if counted.start < counted.stop:
                slopes.append(torch.dot(out[counted], r[counted]))
            if start is not None:
                torch.add(start[rows], piece, alpha=relaxation, out=piece)
        return out, _total(slopes, r)

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
        """`update` by a kernel; returns its second number."""
        assert self._y is not None
        each = weight if isinstance(weight, Tensor) else None
        in_r, factor = (own, share) if isinstance(weight, Tensor) else (missing, share * weight)
        factors = torch.tensor([factor, relaxation], dtype=torch.float64, device="cpu")
        numbers = torch.cat([own, in_r, factors]).to(self.work_dtype)  # one copy to the device
        moved, m = numbers.to(self.device, non_blocking=True), len(own)
        in_y, of_r, factors = moved[:m], moved[m : 2 * m], moved[2 * m :]
        with_r = each is not None or bool(missing.any())
        return kernels.update(
            *(r, in_y, self._y, factors, self.sharding.summed, out),
            in_r=of_r if with_r else None,
            columns=self._r if with_r else None,
            weight=each,
            start=start,
        )

    def clear(self) -> None:
        """Forgets all pairs; the memory stays allocated."""
        self.stored = self.columns = self.fingerprint = 0
        self.generation += 1
        self._weights = [0.0] * len(self._weights)
        if self._y is not None:
            self._y.zero_()
            self._r.zero_()

    def part(self) -> dict[str, Any]:
        """This rank's part of the columns in use, copied to host memory.

        Returns:
            "index": places among the columns in use, from the oldest, of those this rank holds;
            "y" and "r": [len(index), rows], as stored; "weights": [len(index)] float64; "pair": the last (w, r),
            [2, rows], None if none was stored.
        """
        lo, hi = self.sharding.rows
        held = [
            (i, place)
            for i, slot in enumerate(self.live)
            if (place := self.index(slot)) is not None
        ]
        places = [place for _, place in held]
        part: dict[str, Any] = {"index": [i for i, _ in held], "pair": None}
        for name in ("y", "r"):
            part[name] = torch.empty((len(held), hi - lo), dtype=self.dtype, device="cpu")
            for row, place in zip(part[name], places, strict=True):
                row.copy_(getattr(self, f"_{name}")[place])
        weights = [self._weights[i] for i in places]
        part["weights"] = torch.tensor(weights, dtype=torch.float64, device="cpu")
        if self.stored:
            part["pair"] = self._pairs[self._last].cpu().clone()
        return part

    @property
    def last(self) -> int:
        """Which of its two places the last pair lies in: products of unaligned vectors differ."""
        return self._last

    def take(self, part: dict[str, Any], stored: int, columns: int, last: int) -> None:
        """Takes in what `part` of a history of the same rows and columns returned.

        Args:
            part: see `part`; dtypes may be others.
            stored: pairs stored since the last reset.
            columns: h, number of columns in use, at most depth.
            last: 0 or 1, see `last`.
        """
        self.clear()
        self._last = last
        self.stored, self.columns = stored, columns
        if part["pair"] is None:
            return
        if self._y is None:
            self._allocate()
        assert self._y is not None
        self._pairs[self._last].copy_(part["pair"])
        for row, index in enumerate(part["index"]):
            place = self._index[self.live[index]]
            self._weights[place] = float(part["weights"][row])
            for name, stored_as in (("r", self._r), ("y", self._y)):
                stored_as[place].copy_(part[name][row].to(self.device, self.work_dtype))

    def _own(self, gamma: Tensor) -> Tensor:
        return gamma[list(self.sharding.slots)]

    def _wide(self, vector: Tensor) -> Tensor | None:
        """Memory for a chunk of columns in `work_dtype`, where they are stored in another.

        Made once a pass: making it once a chunk left gaps of 0.8 GB in the C library's heap.
        """
        if self.dtype == self.work_dtype:
            return None
        longest = max((len(vector[rows]) for rows in self._chunks(vector)), default=0)
        return vector.new_empty((self._r.shape[0], longest))

    def _chunks(self, vector: Tensor, part: slice = slice(None)) -> Iterator[slice]:
        """The module's `chunks`, no longer than columns may be widened."""
        return chunks(vector, part, None if self.dtype == self.work_dtype else CHUNK_WIDE)

    def _allocate(self) -> None:
        lo, hi = self.sharding.rows
        shape = (len(self.sharding.slots), hi - lo)
        self._y = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._r = torch.zeros(shape, dtype=self.dtype, device=self.device)
        pairs = 2, 2, hi - lo
        self._pairs = torch.zeros(pairs, dtype=self.work_dtype, device=self.device)


def chunks(
    vector: Tensor, part: slice = slice(None), longest: int | None = None
) -> Iterator[slice]:
    """The rows of a vector, or of any of its length and device, a chunk at a time.

    Args:
        vector: [rows].
        part: only these rows.
        longest: chunk; None: any.
    """
    size = _chunk(vector.device)
    size = size if longest is None else min(size, longest)
    first, end, _ = part.indices(vector.numel())
    for lo in range(first, end, size):
        yield slice(lo, min(lo + size, end))


def working_bytes(
    sharding: Sharding,
    dtype: torch.dtype,
    work_dtype: torch.dtype,
    device: torch.device,
    fresh: int,
) -> int:
    """What products of columns take for a moment, at most, beside the history.

    Args:
        sharding: which rows and slots are this rank's.
        dtype: of the stored columns.
        work_dtype: of products.
        device: where the history is.
        fresh: how many columns are multiplied with all, at most.
    """
    rows, columns = sharding.rows[1] - sharding.rows[0], len(sharding.slots)
    narrow = dtype != work_dtype
    size = min(_chunk(device), CHUNK_WIDE) if narrow else _chunk(device)
    longest = min(rows, size)
    tables = -(-rows // size) * (fresh + 1)
    if device.type != "cpu":
        tables = max(tables, kernels.PROGRAMS * (kernels.AT_ONCE + 1))
    widened = columns * longest if narrow else 0
    stacked = (fresh + 1) * longest if device.type != "cpu" else 0
    return (widened + stacked + tables * columns) * work_dtype.itemsize


def _chunk(device: torch.device) -> int:
    return CHUNK if device.type == "cpu" else CHUNK_GPU


def chunked_dot(a: Tensor, b: Tensor, part: slice = slice(None)) -> Tensor:
    """a . b for rows `part` of vectors [rows], as a float64 tensor [] on the device.

    Products of chunks in the dtype of the vectors, their sum in float64: close to float64's
    accuracy at float32's speed.
    """
    return _total([torch.dot(a[rows], b[rows]) for rows in chunks(a, part)], a)


def _total(parts: list[Tensor], like: Tensor) -> Tensor:
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=like.device)
    return torch.stack(parts).sum(dtype=torch.float64)


def _widened(columns: Tensor, memory: Tensor | None) -> Tensor:
    return columns if memory is None else memory[:, : columns.shape[1]].copy_(columns)


def _less(r: Tensor, factor: float, columns: Tensor, weights: Tensor, out: Tensor) -> None:
    """factor * r - columns^T weights into `out`, which may be r: [rows], columns [k, rows]."""
    torch.addmv(r, columns.T, weights, beta=factor, alpha=-1.0, out=out)
