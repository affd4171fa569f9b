"""Anderson acceleration, type II: the point of the smallest residual in the span of the history.

    gamma = argmin || r - R gamma ||                       paper, Eq. 5
    w+ = w + beta [ -W gamma + mixing M (r - R gamma) ]    paper, Eq. 4 and 6 (mixing = 1)

`reference.residual_norm` is the same in one plain function.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aadl_hvd import kernels
from aadl_hvd.config import AndersonConfig
from aadl_hvd.core.collectives import Collectives
from aadl_hvd.core.gram import Gram
from aadl_hvd.core.history import History
from aadl_hvd.core.products import Products
from aadl_hvd.core.shard import WeightShard
from aadl_hvd.core.solve import Factorization, System, promised_reduction
from aadl_hvd.stats import Stats


class ResidualNorm:
    """Implements `Method`.

    Memory on this rank, in numbers of `history_dtype`: 2 m n/P, or 2 n ceil(m/P) with the column
    layout; and 4 n/P, or 4 n, in float32 (float64 where a weight is) for the last pair and the
    next.
    """

    def __init__(
        self, config: AndersonConfig, shard: WeightShard, collectives: Collectives, stats: Stats
    ) -> None:
        self._config, self._collectives, self._stats = config, collectives, stats
        dtype = config.history_dtype or shard.dtype
        self.history = History(shard.sharding, dtype, shard.dtype, shard.device)
        self._products = Products(self.history)
        self.gram = Gram(self._products, collectives)

    @property
    def nbytes(self) -> int:
        """Bytes of history allocated on this rank."""
        return self.history.nbytes

    def staging_buffer(self) -> tuple[Tensor, Tensor]:
        """Memory for the next w and r."""
        return self.history.staging_buffer()

    def note(self, w: Tensor, r: Tensor, scaling: float | None) -> None:
        """Stores a pair of one step as one more column."""
        new = self.history.push(w, r, self._config.mixing * (scaling or 0.0))
        if new is not None:
            self.gram.stored(*new)

    def payload(self, r: Tensor, stored: bool) -> Gram:
        """The new rows of R^T R, R^T r and r^T r."""
        return self.gram.of(r, stored)

    def system(self) -> System | None:
        """R^T R, R^T r and r^T r after the reduction."""
        return self.gram.system

    def propose(
        self, columns: Sequence[int], w: Tensor, r: Tensor, scaling: float | Tensor
    ) -> tuple[Tensor, float]:
        """Solves for gamma and computes this rank's part of the update."""
        config, stats, history = self._config, self._stats, self.history
        with stats.timed("solve"):
            gamma = self._solve(columns)
        with stats.timed("update"):
            # With the column layout the terms of the ranks are added up first.
            start = w if history.sharding.layout == "rows" else None
            update, slope = self._products.update(
                *(r, gamma, config.mixing * scaling, history.scratch(w, r)),
                start=start,
                relaxation=config.relaxation,
            )
            sums = self._collectives.slope(slope.reshape(1).cpu().numpy())
        return update, float(sums[0])

    def drop_older_half(self) -> None:
        """Forgets the older half of the columns: the newest know the way down."""
        self.history.keep(self.history.columns // 2)

    def use_kernels(self, able: bool) -> bool:
        """Has `kernels` do the work if all ranks are able to and dtypes allow it."""
        history = self.history
        usable = able and kernels.usable(history.device, history.work_dtype, history.dtype)
        self._products.use_kernels = usable
        return usable

    def reset(self) -> None:
        """Forgets all pairs."""
        self.history.clear()
        self.gram.clear()

    def _solve(self, columns: Sequence[int]) -> Tensor:
        """gamma [m] float64 on the host, 0 for slots that are not used; the same on every rank."""
        assert self.gram.system is not None
        gram, b, rr = self.gram.system
        gram, b = gram[np.ix_(columns, columns)], b[list(columns)]
        slots = [self.history.live[i] for i in columns]
        precision = torch.finfo(self.history.work_dtype).eps
        factor = Factorization(gram, self._config.regularization, precision)
        gamma = np.zeros(self._config.history_depth)
        gamma[slots] = factor.solve(b)
        gamma = self._collectives.coefficients(gamma)
        self._stats.condition, self._stats.rank = factor.condition, factor.rank
        self._stats.promised_reduction = promised_reduction(gram, b, rr, gamma[slots])
        return torch.from_numpy(gamma)
