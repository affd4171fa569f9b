"""Ring buffer of the columns of W and R, this rank's part of them."""

from __future__ import annotations

import torch
from torch import Tensor

from aadl_hvd.sharding import Sharding

# Rows per product: a chunk of all columns fits the cache, and float32 sums stay short.
CHUNK = 2**18


class History:
    """Differences of successive stored pairs (w, r), in slots used round-robin.

    W[j] = w_j - w_(j-1) and R[j] = r_j - r_(j-1), where j counts stored pairs: the columns of the
    paper's Eq. 2 and 3, held as rows of a matrix so that each is contiguous. Both members of a
    pair belong to the same step. Memory on this rank: 2 * len(slots) * rows numbers of `dtype`
    and 2 * rows numbers of `work_dtype` for the last pair. Allocated at the first `push`.

    Args:
        sharding: which rows and slots are this rank's.
        dtype: of the stored columns.
        work_dtype: of pairs and products, float32 or float64.
        device: where the parameters are.

    Attributes:
        stored: pairs stored since the last restart.
        generation: number of restarts.
        columns: h, number of columns that can be used: at most depth.
    """

    def __init__(
        self, sharding: Sharding, dtype: torch.dtype, work_dtype: torch.dtype, device: torch.device
    ) -> None:
        self.sharding = sharding
        self.dtype = dtype
        self.work_dtype = work_dtype
        self.device = device
        self.stored = 0
        self.generation = 0
        self.columns = 0
        self._place = {slot: i for i, slot in enumerate(sharding.slots)}
        self._w: Tensor | None = None

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
        if self._w is None:
            return 0
        return sum(
            t.numel() * t.element_size() for t in (self._w, self._r, self._last_w, self._last_r)
        )

    @property
    def tokens(self) -> tuple[int, int]:
        """Equal on two ranks where the same pairs were stored since the same restart.

        Below 1024, so that squares of their sums over 2^16 ranks are exact in float64.
        """
        return self.stored % 1024, self.generation % 1024

    def place(self, slot: int) -> int | None:
        """Index of a slot in this rank's columns; None where another rank holds it."""
        return self._place.get(slot)

    def push(self, w: Tensor, r: Tensor) -> tuple[int, Tensor] | None:
        """Stores a pair [rows], of `work_dtype`.

        Returns:
            The slot that was filled, the same on every rank, and the new column of R as it was
            rounded for storage; None for the very first pair, which has nothing to differ from.
        """
        if self._w is None:
            self._allocate()
        slot = None
        if self.stored > 0:
            slot = (self.stored - 1) % self.sharding.depth
            self.columns = min(self.columns + 1, self.sharding.depth)
            # The last pair is overwritten below: its buffers may hold the differences meanwhile.
            torch.sub(w, self._last_w, out=self._last_w)
            torch.sub(r, self._last_r, out=self._last_r)
            delta_r = self._last_r.to(self.dtype)
            if (place := self.place(slot)) is not None:
                self._w[place].copy_(self._last_w)  # type: ignore[index]
                self._r[place].copy_(delta_r)
                delta_r = self._r[place]
            elif delta_r is self._last_r:
                delta_r = delta_r.clone()
        self._last_w.copy_(w)
        self._last_r.copy_(r)
        self.stored += 1
        return None if slot is None else (slot, delta_r)

    def inner(self, slots: list[int], vector: Tensor) -> Tensor:
        """[R_slots, v]^T R on this rank's rows, in one pass over R.

        Args:
            slots: slots that this rank holds.
            vector: v, [rows].

        Returns:
            [len(slots) + 1, len(self.sharding.slots)] float64, on the device.
        """
        places = torch.tensor([self._place[slot] for slot in slots], dtype=torch.long).to(
            self.device
        )
        total = torch.zeros(
            (len(slots) + 1, self._r.shape[0]), dtype=torch.float64, device=self.device
        )
        for lo in range(0, vector.numel(), CHUNK):
            rows = slice(lo, lo + CHUNK)
            columns = self._r[:, rows].to(self.work_dtype)
            others = torch.cat([columns[places], vector[None, rows]])
            total += (others @ columns.T).double()  # twice as fast as its transpose
        return total

    def residual_left(self, r: Tensor, gamma: Tensor) -> Tensor:
        """This rank's part of r - R gamma, [rows]; gamma [depth] float64 on the host.

        With the row layout parts are rows, with the column layout they are terms of a sum.
        """
        return self._combine(r, gamma, residual_weight=1.0, step_weight=0.0)

    def update(self, r: Tensor, gamma: Tensor, mixing: float | Tensor) -> Tensor:
        """This rank's part of -W gamma + mixing * (r - R gamma), [rows].

        Args:
            r: residual, [rows].
            gamma: [depth] float64 on the host.
            mixing: a number, or one for every row, [rows].
        """
        if isinstance(mixing, Tensor):
            left = self._combine(r, gamma, residual_weight=1.0, step_weight=0.0).mul_(mixing)
            return left.add_(self._combine(r, gamma, residual_weight=0.0, step_weight=1.0))
        return self._combine(r, gamma, residual_weight=mixing, step_weight=1.0)

    def clear(self) -> None:
        """Forgets all pairs; the memory stays allocated."""
        self.stored = self.columns = 0
        self.generation += 1
        if self._w is not None:
            self._w.zero_()
            self._r.zero_()

    def _combine(
        self, r: Tensor, gamma: Tensor, residual_weight: float, step_weight: float
    ) -> Tensor:
        out = torch.empty_like(r)
        own = gamma[list(self.sharding.slots)].to(self.device, self.work_dtype)
        for lo in range(0, r.numel(), CHUNK):
            rows = slice(lo, lo + CHUNK)
            if residual_weight and self.sharding.counts_replicated:
                torch.mul(r[rows], residual_weight, out=out[rows])
            else:
                out[rows].zero_()
            if residual_weight:
                out[rows].addmv_(
                    self._r[:, rows].T.to(self.work_dtype), own, alpha=-residual_weight
                )
            if step_weight:
                out[rows].addmv_(self._w[:, rows].T.to(self.work_dtype), own, alpha=-step_weight)  # type: ignore[index]
        return out

    def _allocate(self) -> None:
        lo, hi = self.sharding.rows
        shape = (len(self.sharding.slots), hi - lo)
        self._w = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._r = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._last_w = torch.zeros(hi - lo, dtype=self.work_dtype, device=self.device)
        self._last_r = torch.zeros(hi - lo, dtype=self.work_dtype, device=self.device)


def chunked_dot(a: Tensor, b: Tensor) -> Tensor:
    """a . b for vectors [rows], as a float64 tensor [] on the device.

    Products of chunks in the dtype of the vectors, their sum in float64: close to float64's
    accuracy at float32's speed.
    """
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for lo in range(0, a.numel(), CHUNK):
        total += torch.dot(a[lo : lo + CHUNK], b[lo : lo + CHUNK]).double()
    return total
