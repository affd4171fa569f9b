"""The ring buffer of this rank's columns of R and Y."""

from __future__ import annotations

import torch
from torch import Tensor

from aadl_hvd.checkpoint.history_state import ColumnsState
from aadl_hvd.core.chunking import chunks, part_of
from aadl_hvd.core.sharding import Sharding


class History:
    """Differences of successive stored pairs (w, r), in slots that are filled in turn.

    The columns of the paper's Eq. 2 and 3 are W[j] = w_j - w_(j-1) and R[j] = r_j - r_(j-1). Here
    j counts stored pairs, and both members of a pair belong to the same step. The columns are the
    rows of a matrix, so that each is contiguous in memory.

    In place of W this class stores Y[j] = W[j] + c_j R[j], where c_j is the weight of the residual
    when the pair was stored. As long as the weight c does not change, the update

        -W gamma + c (r - R gamma) = c r - Y gamma

    reads one matrix only. `products` has the passes over the columns.

    Memory on this rank: 2 * len(sharding.slots) * rows numbers of `dtype` for the columns, and
    4 * rows numbers of `work_dtype` for the last pair and the next one. It is allocated when it is
    first needed.

    Args:
        sharding: which rows and slots are this rank's.
        dtype: of the stored columns.
        work_dtype: of pairs and products, float32 or float64.
        device: where the columns are stored.

    Attributes:
        sharding, dtype, work_dtype, device: see the arguments.
        stored: number of pairs stored since the last reset.
        generation: number of resets.
        fingerprint: identifies a loaded history that this rank has yet to go on from, below 2^36;
            0: there is none.
        columns: h, the number of columns that can be used, at most `sharding.depth`.
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
        self.stored = 0
        self.generation = 0
        self.fingerprint = 0
        self.columns = 0
        self._index = {slot: i for i, slot in enumerate(sharding.slots)}
        self._weights = [0.0] * len(self._index)  # c_j
        self._y: Tensor | None = None
        self._r: Tensor
        self._pairs: Tensor  # [2, 2, rows], each (w, r)
        self._vectors: list[tuple[Tensor, ...]] = []  # views of them, made once
        self._last = 0  # which of the two pairs was stored last; the other one is free

    @property
    def live(self) -> list[int]:
        """Slots of the columns that can be used, from the oldest to the newest."""
        first = self.stored - 1 - self.columns
        return [(first + i) % self.sharding.depth for i in range(self.columns)]

    def keep(self, columns: int) -> None:
        """Forgets all but the newest columns, `columns` in number."""
        self.columns = min(self.columns, columns)

    @property
    def nbytes(self) -> int:
        """Bytes allocated on this rank."""
        if self._y is None:
            return 0
        return sum(t.numel() * t.element_size() for t in (self._y, self._r, self._pairs))

    @property
    def version(self) -> tuple[int, ...]:
        """Equal on two ranks that have stored the same pairs since the same reset.

        Each number is below 2^18, so that sums of squares over 2^16 ranks are exact in float64.
        """
        return self.stored % 1024, self.generation % 1024, *divmod(self.fingerprint, 2**18)

    def index(self, slot: int) -> int | None:
        """Index of a slot in `y` and `r`; None if another rank holds it."""
        return self._index.get(slot)

    def indices(self, slots: list[int]) -> list[int]:
        """Indices of slots that this rank holds; KeyError if another rank holds one."""
        return [self._index[slot] for slot in slots]

    @property
    def y(self) -> Tensor:
        """Y as stored, [len(sharding.slots), rows] of `dtype`. Not to be changed."""
        if self._y is None:
            self._allocate()
        assert self._y is not None
        return self._y

    @property
    def r(self) -> Tensor:
        """R as stored, [len(sharding.slots), rows] of `dtype`. Not to be changed."""
        if self._y is None:
            self._allocate()
        return self._r

    @property
    def weights(self) -> list[float]:
        """c_j of each column in `y`, see the class. Not to be changed."""
        return self._weights

    def staging_buffer(self) -> tuple[Tensor, Tensor]:
        """Memory for the next w and r, [rows] of `work_dtype`. `push` takes it without a copy."""
        if self._y is None:
            self._allocate()
        w, r = self._vectors[1 - self._last]
        return w, r

    def scratch(self, *in_use: Tensor) -> Tensor:
        """Memory [rows] of `work_dtype` that overlaps none of the vectors in use.

        It is part of the staging buffer, or new memory if one of the vectors lies there.
        """
        staged, _ = self.staging_buffer()
        taken = any(tensor.data_ptr() == staged.data_ptr() for tensor in in_use)
        return torch.empty_like(staged) if taken else staged

    def push(self, w: Tensor, r: Tensor, weight: float = 0.0) -> tuple[int, Tensor | None] | None:
        """Stores a pair.

        Args:
            w: iterate, [rows] of `work_dtype`.
            r: its residual, likewise.
            weight: c, the weight of residuals in updates; 0 if it is not the same for all rows.

        Returns:
            The slot that was filled, the same on every rank, and, with the column layout, the new
            column of R as it was rounded for storage, [rows] of `work_dtype`. None for the very
            first pair: there is no pair before it.
        """
        next_w, next_r = self.staging_buffer()
        assert self._y is not None
        if w.data_ptr() != next_w.data_ptr():
            next_w.copy_(w)
        if r.data_ptr() != next_r.data_ptr():
            next_r.copy_(r)
        last_w, last_r = self._vectors[self._last]
        self._last = 1 - self._last
        slot = column = None
        if self.stored > 0:
            slot = (self.stored - 1) % self.sharding.depth
            self.columns = min(self.columns + 1, self.sharding.depth)
            if self.sharding.layout == "columns":
                column = torch.empty_like(last_r)
            index = self.index(slot)
            if index is not None:
                self._weights[index] = weight
        for rows in chunks(r) if slot is not None else ():
            # Results go straight into the columns if the dtypes agree. Otherwise they go into the
            # memory of the pair before, which is not needed any more, and are converted from there.
            direct = index is not None and self.dtype == self.work_dtype
            before_w, before_r = part_of(last_w, rows), part_of(last_r, rows)
            to_r = part_of(self._r[index], rows) if direct else before_r
            to_y = part_of(self._y[index], rows) if direct else before_w
            dr = torch.sub(part_of(next_r, rows), before_r, out=to_r)
            if index is not None:
                dw = torch.sub(part_of(next_w, rows), before_w, out=to_y)
                if weight:
                    dw.add_(dr, alpha=weight)
            if index is not None and not direct:
                self._y[index, rows].copy_(dw)
                self._r[index, rows].copy_(dr)
            if column is not None:
                column[rows] = dr.to(self.dtype)
        self.stored += 1
        return None if slot is None else (slot, column)

    def clear(self) -> None:
        """Forgets all pairs; the memory stays allocated."""
        self.stored = self.columns = self.fingerprint = 0
        self.generation += 1
        self._weights = [0.0] * len(self._weights)
        if self._y is not None:
            self._y.zero_()
            self._r.zero_()

    def release(self) -> None:
        """Forgets all pairs, and frees their memory."""
        self.clear()
        self._last, self._y = 0, None
        self._r = self._pairs = torch.empty(0, device=self.device)
        self._vectors = []

    def state(self) -> ColumnsState:
        """The columns in use that are held here, and the last pair, copied to host memory."""
        lo, hi = self.sharding.rows
        held = [(i, self.index(slot)) for i, slot in enumerate(self.live)]
        own = [(i, index) for i, index in held if index is not None]
        y, r = (torch.empty((len(own), hi - lo), dtype=self.dtype, device="cpu") for _ in "yr")
        for row, (_, index) in enumerate(own):
            assert self._y is not None
            y[row].copy_(self._y[index])
            r[row].copy_(self._r[index])
        weights = [self._weights[index] for _, index in own]
        return ColumnsState(
            stored=self.stored,
            count=self.columns,
            last=self._last,
            index=tuple(i for i, _ in own),
            pair=self._pairs[self._last].cpu().clone() if self.stored else None,
            y=y,
            r=r,
            weights=torch.tensor(weights, dtype=torch.float64, device="cpu"),
        )

    def load_state(self, state: ColumnsState) -> None:
        """Loads what `state` of a history of the same rows and columns returned.

        The dtypes may be others.
        """
        self.clear()
        self._last = state.last
        self.stored, self.columns = state.stored, state.count
        if state.pair is None:
            return
        if self._y is None:
            self._allocate()
        assert self._y is not None
        self._pairs[self._last].copy_(state.pair)
        for row, index in enumerate(state.index):
            own = self._index[self.live[index]]
            self._weights[own] = float(state.weights[row])
            self._r[own].copy_(state.r[row].to(self.device, self.work_dtype))
            self._y[own].copy_(state.y[row].to(self.device, self.work_dtype))

    def _allocate(self) -> None:
        lo, hi = self.sharding.rows
        shape = (len(self.sharding.slots), hi - lo)
        self._y = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._r = torch.zeros(shape, dtype=self.dtype, device=self.device)
        pairs = 2, 2, hi - lo
        self._pairs = torch.zeros(pairs, dtype=self.work_dtype, device=self.device)
        self._vectors = [pair.unbind() for pair in self._pairs]
