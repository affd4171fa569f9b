"""Anderson acceleration, type II: the point of the smallest residual in the span of the history.

    gamma = argmin || r - R gamma ||                       paper, Eq. 5
    w+ = w + beta [ -W gamma + mixing M (r - R gamma) ]    paper, Eq. 4 and 6 (mixing = 1)

`reference.residual_norm` is the same in one plain function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aadl_hvd import kernels
from aadl_hvd.config import AndersonConfig
from aadl_hvd.core.acceptance import Acceptance
from aadl_hvd.core.collectives import Collectives
from aadl_hvd.core.fixed_point import FixedPoint
from aadl_hvd.core.gram import Gram
from aadl_hvd.core.history import History
from aadl_hvd.core.loss_check import LossCheck
from aadl_hvd.core.products import Products
from aadl_hvd.core.reduction import Payload
from aadl_hvd.core.shard import WeightShard
from aadl_hvd.core.solve import Factorization, promised_reduction
from aadl_hvd.stats import Rejection, Stats


class ResidualNorm:
    """Implements `Method`.

    Memory on this rank, in numbers of `history_dtype`: 2 m n/P, or 2 n ceil(m/P) with the column
    layout; and 4 n/P, or 4 n, in float32 (float64 where a weight is) for the last pair and the
    next.
    """

    keeps_base_step = False
    decayed = True
    loss_spreads = LossCheck.TOLERANCE

    def __init__(
        self,
        config: AndersonConfig,
        shard: WeightShard,
        collectives: Collectives,
        stats: Stats,
        acceptance: Acceptance,
    ) -> None:
        self._config, self._collectives, self._stats = config, collectives, stats
        self._shard, self._acceptance = shard, acceptance
        dtype = config.history_dtype or shard.dtype
        self.history = History(shard.sharding, dtype, shard.dtype, shard.device)
        self._products = Products(self.history)
        self.gram = Gram(self._products, collectives)

    @property
    def fingerprint(self) -> int:
        """Of a loaded history that this rank has yet to go on from; 0: there is none."""
        return self.history.fingerprint

    @fingerprint.setter
    def fingerprint(self, fingerprint: int) -> None:
        self.history.fingerprint = fingerprint

    @property
    def columns(self) -> int:
        """h, how many columns the history holds now."""
        return self.history.columns

    @property
    def nbytes(self) -> int:
        """Bytes of history allocated on this rank."""
        return self.history.nbytes

    def staging_buffer(self) -> tuple[Tensor, Tensor]:
        """Memory for the next w and r."""
        return self.history.staging_buffer()

    def note(self, w: Tensor, r: Tensor, problem: FixedPoint) -> None:
        """Stores a pair of one step as one more column."""
        scaling = 0.0 if problem.scale_free else problem.uniform_scaling or 0.0
        new = self.history.push(w, r, self._config.mixing * scaling)
        if new is not None:
            self.gram.stored(*new)
        self._stats.stored += 1

    def payloads(self, problem: FixedPoint, r: Tensor, stored: bool) -> Sequence[Payload]:
        """The noise of the gradients; new rows of R^T R, R^T r and r^T r."""
        return self._acceptance.noise, self.gram.of(r, stored)

    @property
    def same(self) -> bool:
        """Whether the last reduction found the same history on all ranks."""
        return self.gram.system is not None

    @property
    def norm(self) -> float:
        """||r|| of the last reduction."""
        assert self.gram.system is not None
        return math.sqrt(self.gram.system[2])

    @property
    def finite(self) -> bool:
        """Whether r is finite on all ranks."""
        return self.gram.system is not None and math.isfinite(self.gram.system[2])

    def propose(self, problem: FixedPoint, w: Tensor, r: Tensor) -> Tensor:
        """This rank's part of the update: which columns, solve, update, descent. Collective."""
        acceptance, gram = self._acceptance, self.gram.system
        assert gram is not None
        acceptance.begin()
        columns = acceptance.columns(gram)
        # There is no mixing term where M r is no step of the base optimizer.
        scaling = 0.0 if problem.scale_free else problem.scaling(*self._shard.rows)
        update, slope = self.update(columns, w, r, scaling)
        acceptance.check_update(slope)
        return update

    def complete(self, w: Tensor, proposal: Tensor) -> Tensor:
        """This rank's rows of the accelerated point. Collective with the column layout."""
        return self._shard.complete(w, proposal, self._config.relaxation)

    def update(
        self, columns: Sequence[int], w: Tensor, r: Tensor, scaling: float | Tensor
    ) -> tuple[Tensor, float]:
        """This rank's part of the update, and the slope <w+ - w, r> over all ranks. Collective.

        Args:
            columns: those to use, counted from the oldest.
            w: iterate, [rows].
            r: its residual, [rows].
            scaling: the diagonal of M: a number, or [rows].

        Returns:
            What `WeightShard.complete` makes the new rows of, [rows]; the slope.
        """
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

    def rejected(self, cause: Rejection) -> None:
        """Where descent rejects, the older half is forgotten: the newest know the way down."""
        if cause is Rejection.DESCENT:
            self.history.keep(self.history.columns // 2)

    def went_back(self) -> None:
        """The history stays: it holds what was measured."""

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

    def release(self) -> None:
        """Forgets all pairs, and frees their memory."""
        self.reset()
        self._shard.captures.forget()
        self.history.release()

    def restart_generation(self) -> None:
        """From here on the same on all ranks."""
        self.history.generation = 0

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
