"""The Gram matrix R^T R: this rank's contribution, and its assembly by one small allreduce."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from aadl_hvd.checkpoint.history_state import GramState
from aadl_hvd.core.collectives import Collectives
from aadl_hvd.core.products import Products
from aadl_hvd.core.reduction import equal
from aadl_hvd.core.solve import Matrix, System, Vector

# The most m x m matrices that the host holds at once: R^T R, its columns in use, those that stand
# out of the noise; a message as sent, received and summed; seven for the eigen-decomposition and
# its working memory; one to round up. Measured in one process at m = 1000: 13.
MATRICES = 14

# R^T r may lose accuracy by this factor when it is updated instead of computed anew.
DRIFT = 10.0


class Gram:
    """Keeps R^T R [m, m], float64, the same on every rank, and brings it up to date on demand.

    Only the rows of slots that were filled since the last assembly are computed. The message has
    (m + 1) m + 9 float64 numbers and the payload, whatever a rank has stored. It contains the
    version of the history, so that a rank that has stored something else is noticed, and no rank
    waits for it.

    In the row layout the new rows are computed at assembly, in one pass over R. In the column
    layout no rank holds two columns of different ranks. So each rank multiplies its own columns
    with a new column when it is stored, while it is at hand.

    R^T r needs no full product if r was stored last. Then r is the r of the last assembly plus the
    columns stored since, and the products of these with R are the new rows. Only the new columns
    are multiplied with r. Rounding adds an error of at most eps ||R_j|| sum ||r_k - r_(k-1)||.
    Before that exceeds DRIFT times eps ||R_j|| ||r||, R^T r is computed anew in the same pass. If
    ||r|| has fallen suddenly, it takes one more pass and one more small message.

    R^T r is also computed anew in three other cases: if r was not stored; if columns are rounded,
    so that r is not the sum of what is stored; and on a GPU in the row layout, where one more row
    in a product of matrices costs next to nothing.

    Args:
        products: with the columns of this rank's history.
        collectives: of the ranks that sum up.

    Implements `reduction.Payload`.

    Attributes:
        system: R^T R [h, h], R^T r [h] and r^T r after a reduction, for the h columns in use from
            the oldest to the newest, with the same bits on every rank. They may contain NaN or
            Inf, then on every rank. None, on every rank, if the ranks have not stored the same
            pairs.
    """

    part = "gram"

    def __init__(self, products: Products, collectives: Collectives) -> None:
        self._passes = products
        self._history = history = products.history
        self._collectives = collectives
        self.system: System | None = None
        self._r: Tensor
        self._newest = False
        self._depth = history.sharding.depth
        self._matrix: Matrix = np.zeros((self._depth, self._depth))
        self._fresh: dict[int, Tensor | None] = {}
        # R^T r [m] of the last pair that was stored, None if it is not known; and the sum of norms
        # that bounds its rounding error.
        self._carried: Vector | None = None
        self._drift = 0.0

    def partial(self, r: Tensor, newest: bool) -> Tensor:
        """This rank's contribution to the rows of k new columns, to R^T r and to r^T r.

        Args:
            r: this rank's rows of the residual, [rows].
            newest: whether r is the residual that was stored last; the same on every rank.

        Returns:
            All of it in a row, [(k + 1) * len(sharding.slots) + 1] float64, on the device.
        """
        history, sharding = self._history, self._history.sharding
        if not history.stored:
            return torch.zeros(len(sharding.slots) + 1, dtype=torch.float64, device="cpu")
        known = [column for column in self._fresh.values() if column is not None]
        slots = list(self._fresh) if sharding.layout == "rows" else []
        only = None
        if self._carries(newest):
            only = [slot for slot in self._fresh if history.index(slot) is not None]
        own, square = self._passes.inner(slots, r, only)
        square = square * float(sharding.counts_replicated)
        return torch.cat([*(row.reshape(-1) for row in (*known, own)), square.reshape(1)])

    def _carries(self, newest: bool) -> bool:
        some = len(self._fresh) < self._history.columns  # otherwise all columns are new
        return newest and some and self._carried is not None

    @property
    def _worthwhile(self) -> bool:
        """Whether R^T r may be updated, and whether that is faster: see the class."""
        history = self._history
        on_gpu = history.device.type != "cpu" and history.sharding.layout == "rows"
        return history.dtype == history.work_dtype and not on_gpu

    def stored(self, slot: int, column: Tensor | None) -> None:
        """Notes a new column. No communication.

        Args:
            slot: where it is stored.
            column: what `History.push` returned with the slot.
        """
        self._fresh.pop(slot, None)  # and to the end: rows are assembled in the order of storing
        self._fresh[slot] = None if column is None else self._multiplied(column)

    def of(self, r: Tensor, newest: bool) -> Gram:
        """Multiplies R with r in the next reduction.

        Args:
            r: this rank's rows of the residual, [rows].
            newest: whether r is the residual that was stored last; the same on every rank.
        """
        self._r, self._newest, self.system = r, newest, None
        return self

    def pending(self) -> list[Tensor]:
        """This rank's contribution, on the device."""
        return [self.partial(self._r, self._newest)]

    def pack(self, numbers: list[Vector]) -> Vector:
        """[(m + 1) m + 9] numbers to be summed: new rows, R^T r, r^T r, and the version."""
        k, m = len(self._fresh), self._depth
        table = np.zeros((m + 1, m))
        own = np.ix_([*range(k), m], self._history.sharding.slots)
        products, rr = numbers[0][:-1], numbers[0][-1]
        table[own] = products.reshape(table[own].shape)
        version = np.array(self._history.version, dtype=np.float64)
        version[1] = 2.0 * version[1] + self._newest  # ranks must agree on it, too
        return np.concatenate([table.reshape(-1), [rr], version, version**2])

    def unpack(self, sums: Vector, size: int) -> None:
        """Brings R^T R up to date and sets `system`. Collective: rarely, one more allreduce."""
        r, k, m = self._r, len(self._fresh), self._depth
        del self._r  # between steps nothing here keeps it alive
        numbers, versions = np.split(sums, [(m + 1) * m + 1])
        if not equal(versions, size):
            return
        table, rr = numbers[:-1].reshape(m + 1, m), float(numbers[-1])
        for slot, row in zip(self._fresh, table[:k], strict=True):
            self._matrix[slot, :] = row
            self._matrix[:, slot] = row
        norm = math.sqrt(max(rr, 0.0))
        b = self._multiply(table[:k], table[m], norm, r, self._newest)
        self._fresh.clear()
        live = self._history.live
        self.system = self._matrix[np.ix_(live, live)], b[live], rr

    def _multiply(self, rows: Matrix, last: Vector, norm: float, r: Tensor, newest: bool) -> Vector:
        """R^T r [m] from the sums: the rows of new columns, the last row, and ||r||."""
        direct = not self._carries(newest)
        if not direct:
            assert self._carried is not None
            carried, fresh = self._carried + rows.sum(axis=0), list(self._fresh)
            carried[fresh] = last[fresh]
            moved = float(np.sqrt(self._matrix[fresh, fresh].clip(min=0.0)).sum())
            self._drift += moved
            if self._drift > DRIFT * norm:  # the same on every rank
                direct, last = True, self.project(r)
            else:
                last = carried
        if direct:
            self._drift, moved = norm, 0.0
        sound = math.isfinite(self._drift) and bool(np.isfinite(last).all())
        # If one of the next two updates might exceed the bound, R^T r is computed anew next time.
        lasts = self._drift + 2.0 * moved <= DRIFT * norm
        self._carried = last if newest and sound and lasts and self._worthwhile else None
        return last

    def project(self, v: Tensor) -> Vector:
        """R^T v [m], the same on every rank. Collective: one allreduce.

        Args:
            v: this rank's rows of a vector, [rows].
        """
        sums = np.zeros(self._depth)
        sums[list(self._history.sharding.slots)] = self._multiplied(v).cpu().numpy()
        return self._collectives.product(sums)

    def _multiplied(self, v: Tensor) -> Tensor:
        """This rank's contribution to R^T v, [len(sharding.slots)]."""
        return self._passes.inner([], v)[0][0]

    def state(self) -> GramState:
        """R^T R of the columns in use, and what is missing in it; see the class."""
        live = self._history.live
        fresh = [slot for slot in self._fresh if slot in live]
        carried = self._carried if len(fresh) == len(self._fresh) else None
        return GramState(
            matrix=torch.from_numpy(self._matrix[np.ix_(live, live)]),
            fresh=tuple(live.index(slot) for slot in fresh),
            carried=None if carried is None else torch.from_numpy(carried[live]),
            drift=0.0 if carried is None else self._drift,
            products=self._products(fresh),
        )

    def _products(self, fresh: list[int]) -> Tensor | None:
        """With the column layout [columns held, fresh ones] float64, on the host, else None."""
        if self._history.sharding.layout == "rows":
            return None
        held = self._held()
        rows = [row.cpu()[held] for slot in fresh if (row := self._fresh[slot]) is not None]
        nothing = torch.zeros((len(held), 0), dtype=torch.float64, device="cpu")
        return torch.stack(rows, dim=1) if rows else nothing

    def _held(self) -> list[int]:
        """Of the columns in use, from the oldest, those held here: their indices there."""
        history = self._history
        return [i for slot in history.live if (i := history.index(slot)) is not None]

    def load_state(self, state: GramState) -> None:
        """Loads what `state` returned; the history has loaded its columns before."""
        self.clear()
        live, sharding = self._history.live, self._history.sharding
        self._matrix[np.ix_(live, live)] = state.matrix.numpy()
        self._drift, self._carried = state.drift, None
        if state.carried is not None and self._worthwhile:
            self._carried = np.zeros(self._depth)
            self._carried[live] = state.carried.numpy()
        for i, index in enumerate(state.fresh):
            row = None
            if state.products is not None and sharding.layout == "columns":
                row = state.products.new_zeros(len(sharding.slots))
                row[self._held()] = state.products[:, i]
                row = row.to(self._history.device)
            self._fresh[live[index]] = row

    def clear(self) -> None:
        """Forgets everything, together with the history."""
        self._matrix, self._fresh = np.zeros_like(self._matrix), {}
        self._carried, self._drift = None, 0.0


def matrix_bytes(depth: int, ranks: int) -> int:
    """The most bytes that all m x m matrices of a rank take on the host.

    Args:
        depth: m.
        ranks: number of ranks that train together. A rank keeps memory for a message of each of
            its neighbours in a binomial tree.
    """
    return 8 * depth * (depth + 1) * (MATRICES + ranks.bit_length())
