"""This rank's shard of the flat weight vector: its rows, their memory, and how it is published."""

from __future__ import annotations

import torch
from torch import Tensor

from aadl_hvd.comm.base import Gathering, ShardGroup
from aadl_hvd.config import AndersonConfig
from aadl_hvd.core.collectives import Collectives
from aadl_hvd.core.fixed_point import FixedPoint
from aadl_hvd.core.sharding import Sharding
from aadl_hvd.stats import Stats


class WeightShard:
    """Rows [lo, hi) of the flat vector, with the column layout all of them.

    Args:
        sharding: which rows these are.
        dtype: of vectors on these rows: float32, or float64 where a weight is float64.
        device: of the weights.
        collectives: of the group that shares the vector.
        stats: timers and bytes.
    """

    def __init__(
        self,
        sharding: Sharding,
        dtype: torch.dtype,
        device: torch.device,
        collectives: Collectives,
        stats: Stats,
    ) -> None:
        self.sharding, self.dtype, self.device = sharding, dtype, device
        self._collectives, self._stats = collectives, stats

    @property
    def rows(self) -> tuple[int, int]:
        """Half-open range of this rank's rows."""
        return self.sharding.rows

    def empty(self) -> Tensor:
        """A new vector on these rows, not initialised: [hi - lo]."""
        lo, hi = self.rows
        return torch.empty(hi - lo, dtype=self.dtype, device=self.device)

    def complete(self, w: Tensor, update: Tensor, relaxation: float) -> Tensor:
        """This rank's rows of w + relaxation * update, from what `Method.update` returned.

        With the row layout that is what it returned. With the column layout it returned this
        rank's term of the update, and the terms are summed over the group. Collective.

        Args:
            w: [rows].
            update: [rows]; it is overwritten.
            relaxation: beta.
        """
        if self.sharding.layout == "rows":
            return update
        with self._stats.timed("gather"):
            update = self._collectives.update(update)
            return torch.add(w, update, alpha=relaxation, out=update)

    def publish(self, problem: FixedPoint, rows: Tensor) -> None:
        """Makes the rows of all ranks the weights, on every rank. Collective.

        This is the one large message of an accelerated step. With the column layout every rank
        has all rows already.

        Args:
            problem: whose weights are written.
            rows: this rank's, [hi - lo].
        """
        with problem.followed():
            self.show(problem, rows)

    def show(self, problem: FixedPoint, rows: Tensor) -> None:
        """As `publish`, for a while: the base optimizer remembers nothing of it. Collective."""
        self._write(problem, rows)
        if whole := problem.replicated:
            flat = torch.cat([t.detach().reshape(-1).to(self.dtype) for t in whole])
            flat = flat if problem.leads else torch.zeros_like(flat)
            flat = self._collectives.from_one_rank(flat)
            pieces = torch.split_with_sizes(flat, [t.numel() for t in whole])
            with torch.no_grad():
                for tensor, piece in zip(whole, pieces, strict=True):
                    tensor.copy_(piece.view_as(tensor))

    def _write(self, problem: FixedPoint, rows: Tensor) -> None:
        block = self.sharding.block
        if self.sharding.layout == "columns":
            with self._stats.timed("write"):
                return problem.write(rows)
        rows = self._padded(rows)
        with self._collectives.weights(rows) as pieces:
            while True:
                with self._stats.timed("gather"):
                    first, blocks = next(pieces, (0, None))
                if blocks is None:
                    return None
                with self._stats.timed("write"):
                    if blocks.shape[1] == block:
                        problem.write(blocks.reshape(-1))
                        continue
                    for rank, piece in enumerate(blocks):
                        problem.write(piece, rank * block + first)

    def send(self, rows: Tensor) -> Gathering:
        """Starts to gather a displacement of the weights for `add`. Collective.

        Args:
            rows: this rank's, [hi - lo]; they must not change before they are added.
        """
        with self._stats.timed("gather"):
            return self._collectives.jump_later(self._padded(rows))

    def add(self, problem: FixedPoint, gathering: Gathering) -> None:
        """Adds a displacement to the weights when it has arrived. Not collective.

        Equal weights stay equal: every rank adds the same numbers, in the dtype of `empty`.
        """
        with self._stats.timed("gather"):
            displacement = gathering.wait().reshape(-1)[: self.sharding.n]
        with self._stats.timed("write"), problem.followed():
            problem.add(displacement)

    def _padded(self, rows: Tensor) -> Tensor:
        """Rows in the length of a block, which all ranks' messages have."""
        missing = self.sharding.block - rows.numel()
        return torch.nn.functional.pad(rows, (0, missing)) if missing else rows


def sharding_of(config: AndersonConfig, group: ShardGroup, n: int) -> Sharding:
    """The part of a history of columns of n numbers that is this rank's."""
    ranks = group.comm.size, group.comm.rank, group.count, group.index
    return Sharding(config.layout, n, config.history_depth, *ranks)
