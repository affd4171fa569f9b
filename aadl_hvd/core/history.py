"""The ring buffer of this rank's columns of R and Y."""

from __future__ import annotations

import torch
from torch import Tensor

from aadl_hvd.checkpoint.history_state import ColumnsState
from aadl_hvd.core.chunking import CHUNK_GPU, chunk_rows, chunks, part_of
from aadl_hvd.core.sharding import Sharding

# Rows up to which the next r has memory of its own. In steps with few rows calls of torch take the
# time, not passes over memory, and CUDA graphs need vectors that stay where they are.
FEW_ROWS = CHUNK_GPU


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
    first needed. With many rows the 4 are 3: the next r of a step that stores is read into the
    slot of R that it will fill (`shares_slots`). In a step that does not store it has memory of
    its own.

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
        self._shares = shares_slots(sharding, dtype, work_dtype)
        self._pairs: Tensor  # [4, rows]: w, w, r, r; where slots are shared [3, rows]: w, w, r
        # The w and r of two pairs, views of them that are made once. Shared slots: one r for both.
        self._vectors: list[tuple[Tensor, Tensor]] = []
        self._last = 0  # which of the two pairs was stored last; the other one is free
        self._spare: Tensor | None = None  # the next r of a step that does not store
        self._staged: int | None = None  # index of the slot that the next r was read into

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
        held = [self._y, self._r, self._pairs, *([] if self._spare is None else [self._spare])]
        return sum(t.numel() * t.element_size() for t in held)

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

    def staging_buffer(self, stores: bool = True) -> tuple[Tensor, Tensor]:
        """Memory for the next w and r, [rows] of `work_dtype`. `push` takes it without a copy.

        Args:
            stores: whether this step is to call `push`; the same on every rank. Then the column
                that `push` overwrites is forgotten: with many rows the next r lies in its memory.
        """
        if self._y is None:
            self._allocate()
        w, r = self._vectors[1 - self._last]
        if stores:
            self.keep(self.sharding.depth - 1)
        if not self._shares:
            return w, r
        self._clean()  # where the step before did not store
        if not stores:
            if self._spare is None:
                self._spare = torch.empty_like(r)
            return w, self._spare
        self._spare, self._staged = None, self._index[self._next_slot]
        return w, self._r[self._staged]

    def scratch(self, *in_use: Tensor) -> Tensor:
        """Memory [rows] of `work_dtype` that overlaps none of the vectors in use.

        It is the next w's, or new memory if one of the vectors lies there.
        """
        staged, _ = self._vectors[1 - self._last]
        taken = any(tensor.data_ptr() == staged.data_ptr() for tensor in in_use)
        return torch.empty_like(staged) if taken else staged

    @property
    def _next_slot(self) -> int:
        """The slot that the next pair fills, if it is not the very first one."""
        return (self.stored - 1) % self.sharding.depth

    @property
    def newest_r(self) -> Tensor:
        """The r of the pair that was stored last, [rows]. Not to be changed."""
        return self._vectors[self._last][1]

    def push(self, w: Tensor, r: Tensor, weight: float = 0.0) -> tuple[int, Tensor | None] | None:
        """Stores a pair.

        Args:
            w: iterate, [rows] of `work_dtype`.
            r: its residual, likewise. If it is that of `staging_buffer`, it may be overwritten.
            weight: c, the weight of residuals in updates; 0 if it is not the same for all rows.

        Returns:
            The slot that was filled, the same on every rank, and, with the column layout, the new
            column of R as it was rounded for storage, [rows] of `work_dtype`. None for the very
            first pair: there is no pair before it.
        """
        if self._y is None:
            self._allocate()
        assert self._y is not None
        next_w, next_r = self._vectors[1 - self._last]
        last_w, last_r = self._vectors[self._last]
        if w.data_ptr() != next_w.data_ptr():
            next_w.copy_(w)
        if self._shares:
            next_r = r
        elif r.data_ptr() != next_r.data_ptr():
            next_r.copy_(r)
        slot = column = None
        if self.stored > 0:
            slot = self._next_slot
            self.columns = min(self.columns + 1, self.sharding.depth)
            if self.sharding.layout == "columns":
                column = torch.empty_like(last_r)
            index = self.index(slot)
            if index is not None:
                self._weights[index] = weight
        aside = None  # memory for a chunk of the next r, where its own becomes that of a column
        if self._shares:
            aside = torch.empty_like(r[: chunk_rows(r.device)])
        for rows in chunks(r) if slot is not None else ():
            # Results go straight into the columns if the dtypes agree. Otherwise they go into the
            # memory of the pair before, which is not needed any more, and are converted from there.
            direct = index is not None and self.dtype == self.work_dtype
            before_w, before_r = part_of(last_w, rows), part_of(last_r, rows)
            to_r = part_of(self._r[index], rows) if direct else before_r
            to_y = part_of(self._y[index], rows) if direct else before_w
            new_r = part_of(next_r, rows)
            if aside is not None:
                new_r = aside[: len(new_r)].copy_(new_r)
            dr = torch.sub(new_r, before_r, out=to_r)
            if aside is not None:
                before_r.copy_(new_r)
            if index is not None:
                dw = torch.sub(part_of(next_w, rows), before_w, out=to_y)
                if weight:
                    dw.add_(dr, alpha=weight)
            if index is not None and not direct:
                self._y[index, rows].copy_(dw)
                self._r[index, rows].copy_(dr)
            if column is not None:
                column[rows] = dr.to(self.dtype)
        if self._shares and slot is None:
            last_r.copy_(r)
            self._clean()
        self._staged = None
        self._last = 1 - self._last
        self.stored += 1
        return None if slot is None else (slot, column)

    def _clean(self) -> None:
        """Forgets the next r where it was read into a slot that no pair has filled."""
        if self._staged is not None:
            self._r[self._staged].zero_()  # products with unused columns must be finite
            self._staged = None

    def clear(self) -> None:
        """Forgets all pairs; the memory stays allocated."""
        self.stored = self.columns = self.fingerprint = 0
        self.generation += 1
        self._weights = [0.0] * len(self._weights)
        if self._y is not None:
            self._y.zero_()
            for i, r in enumerate(self._r):
                if i != self._staged:  # a step that runs has read its r into it
                    r.zero_()

    def release(self) -> None:
        """Forgets all pairs, and frees their memory."""
        self.clear()
        self._last, self._y = 0, None
        self._r = self._pairs = torch.empty(0, device=self.device)
        self._vectors, self._spare, self._staged = [], None, None

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
            pair=torch.stack([x.cpu() for x in self._vectors[self._last]]) if self.stored else None,
            y=y,
            r=r,
            weights=torch.tensor(weights, dtype=torch.float64, device="cpu"),
        )

    def load_state(self, state: ColumnsState) -> None:
        """Loads what `state` of a history of the same rows and columns returned.

        The dtypes may be others.
        """
        self.clear()
        self._last, self._staged = state.last, None
        self.stored, self.columns = state.stored, state.count
        if state.pair is None:
            return
        if self._y is None:
            self._allocate()
        assert self._y is not None
        for vector, loaded in zip(self._vectors[self._last], state.pair, strict=True):
            vector.copy_(loaded)
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
        vectors = 3 if self._shares else 4, hi - lo
        self._pairs = torch.zeros(vectors, dtype=self.work_dtype, device=self.device)
        each = self._pairs.unbind()
        self._vectors = [(each[0], each[2]), (each[1], each[-1])]


def shares_slots(sharding: Sharding, dtype: torch.dtype, work_dtype: torch.dtype) -> bool:
    """Whether the next r of a step that stores lies in the slot of R that it fills.

    Args:
        sharding: which rows and slots are this rank's. A slot must be there, of all rows.
        dtype: of the stored columns. It must be that of r.
        work_dtype: of pairs.
    """
    lo, hi = sharding.rows
    return sharding.layout == "rows" and dtype == work_dtype and hi - lo > FEW_ROWS
