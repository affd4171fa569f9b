"""The Gram matrix R^T R: this rank's part of it, and its assembly by one tiny allreduce."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadl_hvd.comm.base import Communicator
from aadl_hvd.core import replicas
from aadl_hvd.core.history import History
from aadl_hvd.core.solve import Matrix, Vector

System = tuple[Matrix, Vector, float]

# How many m x m matrices the host holds at once, at most: R^T R, its columns in use, those clear of
# noise; a message as sent, received and summed; seven for the eigen-decomposition and what it works
# in; one more, for rounding up. Measured in one process at m = 1000: 13.
MATRICES = 14

# By how much R^T r, carried forward, may be less accurate than if it were multiplied out.
DRIFT = 10.0


class Gram:
    """Keeps R^T R [m, m], float64, the same on every rank, and brings it up to date on demand.

    Only rows of slots that were filled since the last assembly are computed. The message has the
    same length whatever a rank has stored, (m + 1) m + 9 float64 numbers and what rides along, and
    says what it has stored, so that a rank that differs is noticed and waits for nobody.

    In the row layout the rows are computed at assembly, in one pass over R. In the column layout
    nobody holds two columns of different ranks, so each rank multiplies its own columns with a new
    one while that is at hand, when it is stored.

    R^T r needs no product of its own where r was stored last: r is the r of the last assembly and
    what was stored since, whose products with R are the new rows. Only the new columns are
    multiplied with r. What rounding adds is bounded by eps ||R_j|| sum ||r_k - r_(k-1)||; before
    that is more than DRIFT times eps ||R_j|| ||r||, all is multiplied out, in the same pass; where
    r has fallen at once, in one more pass and tiny message. All is, too, where r was not stored;
    where columns are rounded, so that r is not the sum of what is stored; and where a GPU
    multiplies rows of R: there one row more in a product of matrices costs next to nothing.

    Attributes:
        sent: bytes that a rank has handed to allreduces, ever.
    """

    def __init__(self, history: History, comm: Communicator) -> None:
        self._history = history
        self._comm = comm
        self._depth = history.sharding.depth
        self._matrix: Matrix = np.zeros((self._depth, self._depth))
        self._fresh: dict[int, Tensor | None] = {}
        # R^T r [m] of the last pair that was stored, None where it is not known, and the norms that
        # its rounding goes by.
        self._carried: Vector | None = None
        self._drift = 0.0
        self.sent = 0

    def partial(self, r: Tensor, newest: bool) -> Tensor:
        """This rank's part of the rows of new columns, of R^T r and of r^T r, one after the other.

        Args:
            r: this rank's rows of the residual, [rows].
            newest: whether it was stored, last of all; the same on every rank.

        Returns:
            [(k + 1) own slots + 1] float64, on the device.
        """
        history, sharding = self._history, self._history.sharding
        if not history.stored:
            return torch.zeros(len(sharding.slots) + 1, dtype=torch.float64, device="cpu")
        known = [column for column in self._fresh.values() if column is not None]
        slots = list(self._fresh) if sharding.layout == "rows" else []
        only = None
        if self._carries(newest):
            only = [slot for slot in self._fresh if history.index(slot) is not None]
        own, square = history.inner(slots, r, only)
        square = square * float(sharding.counts_replicated)
        return torch.cat([*(row.reshape(-1) for row in (*known, own)), square.reshape(1)])

    def _carries(self, newest: bool) -> bool:
        some = len(self._fresh) < self._history.columns  # else all are new
        return newest and some and self._carried is not None

    @property
    def _worthwhile(self) -> bool:
        """Whether R^T r may be carried forward at all, and gains by it: see the class."""
        history = self._history
        on_gpu = history.device.type != "cpu" and history.sharding.layout == "rows"
        return history.dtype == history.work_dtype and not on_gpu

    def stored(self, slot: int, column: Tensor | None) -> None:
        """Takes note of a new column in `slot`, as `History.push` returned it; no communication."""
        self._fresh.pop(slot, None)  # to the end: rows are assembled in the order of storing
        self._fresh[slot] = None if column is None else self._multiplied(column)

    def assemble(
        self, partial: Vector, payload: Vector, r: Tensor, newest: bool
    ) -> tuple[System | None, Vector]:
        """Brings R^T R up to date and multiplies R with r. Collective: one allreduce, rarely two.

        Args:
            partial: what `partial` returned, on the host.
            payload: [e] numbers to be summed over ranks in the same message.
            r: what `partial` was given.
            newest: what `partial` was given.

        Returns:
            R^T R [h, h], R^T r [h] and r^T r, the same bits on every rank, for the h columns in
            use from the oldest to the newest; they may hold NaN or Inf, then on every rank. None,
            on every rank, if the ranks have not stored the same pairs. And the sums of the payload.
        """
        k, m = len(self._fresh), self._depth
        table = np.zeros((m + 1, m))
        own = np.ix_([*range(k), m], self._history.sharding.slots)
        products, rr = partial[:-1], partial[-1]
        table[own] = products.reshape(table[own].shape)
        version = np.array(self._history.version, dtype=np.float64)
        version[1] = 2.0 * version[1] + newest  # what is done with the sums hangs on it
        message = np.concatenate([payload, table.reshape(-1), [rr], version, version**2])
        summed, message = np.split(self._sum(message), [len(payload)])
        numbers, version = np.split(message, [-2 * len(version)])
        if not replicas.equal(version, self._comm.size):
            return None, summed
        table, rr = numbers[:-1].reshape(m + 1, m), float(numbers[-1])
        for slot, row in zip(self._fresh, table[:k], strict=True):
            self._matrix[slot, :] = row
            self._matrix[:, slot] = row
        b = self._multiply(table[:k], table[m], math.sqrt(max(rr, 0.0)), r, newest)
        self._fresh.clear()
        live = self._history.live
        return (self._matrix[np.ix_(live, live)], b[live], rr), summed

    def _multiply(self, rows: Matrix, last: Vector, norm: float, r: Tensor, newest: bool) -> Vector:
        """R^T r [m] from what was summed up: rows of new columns, the last one, and ||r||."""
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
        # Where the next one, or the one after, might be too much, it is multiplied out in time.
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
        return self._sum(sums)

    def _sum(self, message: Vector) -> Vector:
        self.sent += message.nbytes
        return self._comm.allreduce(message)

    def _multiplied(self, v: Tensor) -> Tensor:
        """This rank's part of R^T v, [own slots]."""
        return self._history.inner([], v)[0][0]

    def state(self) -> dict[str, Any]:
        """R^T R of the columns in use [h, h] float64, from the oldest, and what is missing in it.

        The same on every rank: "matrix"; "fresh": columns whose rows have yet to be computed;
        "carried": R^T r [h] float64, None if it is not known, and "drift": see the class.
        """
        live = self._history.live
        fresh = [live.index(slot) for slot in self._fresh if slot in live]
        state = {"matrix": torch.from_numpy(self._matrix[np.ix_(live, live)]), "fresh": fresh}
        if self._carried is None or len(fresh) < len(self._fresh):
            return state | {"carried": None, "drift": 0.0}
        return state | {"carried": torch.from_numpy(self._carried[live]), "drift": self._drift}

    def products(self) -> Tensor | None:
        """With the column layout [columns held, fresh ones] float64, on the host, else None."""
        if self._history.sharding.layout == "rows":
            return None
        live = self._history.live
        held = [place for slot in live if (place := self._history.index(slot)) is not None]
        known = [self._fresh[live[i]] for i in self.state()["fresh"]]
        rows = [row.cpu()[held] for row in known if row is not None]
        nothing = torch.zeros((len(held), 0), dtype=torch.float64, device="cpu")
        return torch.stack(rows, dim=1) if rows else nothing

    def take(self, state: dict[str, Any], products: Tensor | None) -> None:
        """Takes in `state` and `products`; the history has taken its columns before."""
        self.clear()
        live = self._history.live
        self._matrix[np.ix_(live, live)] = state["matrix"].numpy()
        self._drift, self._carried = state["drift"], None
        if state["carried"] is not None and self._worthwhile:
            self._carried = np.zeros(self._depth)
            self._carried[live] = state["carried"].numpy()
        held = [place for slot in live if (place := self._history.index(slot)) is not None]
        for i, index in enumerate(state["fresh"]):
            row = None
            if products is not None and self._history.sharding.layout == "columns":
                row = products.new_zeros(len(self._history.sharding.slots))
                row[held] = products[:, i]
                row = row.to(self._history.device)
            self._fresh[live[index]] = row

    def clear(self) -> None:
        """Forgets everything, together with the history."""
        self._matrix, self._fresh = np.zeros_like(self._matrix), {}
        self._carried, self._drift = None, 0.0


def matrix_bytes(depth: int, ranks: int) -> int:
    """What all m x m matrices of a rank take on the host, at most.

    Args:
        depth: m.
        ranks: that train together; one of them keeps memory for a message of each of its
            neighbours in a binomial tree.
    """
    return 8 * depth * (depth + 1) * (MATRICES + ranks.bit_length())
