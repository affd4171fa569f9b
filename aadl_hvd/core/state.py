"""What an accelerator consists of: how it begins, is reset, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable

import torch

from aadl_hvd.checkpoint.shard_state import ShardState
from aadl_hvd.comm.base import Communicator, ShardGroup
from aadl_hvd.comm.local import PendingCommunicator
from aadl_hvd.config import AndersonConfig
from aadl_hvd.core import memory
from aadl_hvd.core.acceptance import Acceptance
from aadl_hvd.core.averages import WeightAverages
from aadl_hvd.core.collectives import Collectives
from aadl_hvd.core.fixed_point import FixedPoint, work_dtype
from aadl_hvd.core.handover import Handover
from aadl_hvd.core.methods.base import Method
from aadl_hvd.core.methods.residual import ResidualNorm
from aadl_hvd.core.methods.subspace import Subspace
from aadl_hvd.core.moving_average import MovingAverage
from aadl_hvd.core.numerics import plain_numerics
from aadl_hvd.core.persistence import Persistence, put_back_counters
from aadl_hvd.core.replicas import Replicas
from aadl_hvd.core.shard import WeightShard, sharding_of
from aadl_hvd.core.sharding import Sharding
from aadl_hvd.stats import Reset, Stats

DECAY_TOLERANCE = 0.1  # relative change of a weight decay that stored residuals can bear


class AcceleratorState:
    """The modules that an accelerator is made of, on one rank. `Accelerator` adds the steps.

    Args:
        config: settings.
        comm: the ranks that train together; the same settings on all of them.
        group: those of them that share one history, P in number; None: all.

    Attributes:
        config: the settings.
        stats: counters, see `Stats`.
        agreed: whether `agree` has been called, on all ranks.
        full_state: the whole history, where and while `consolidate_state_dict` has left it.
    """

    def __init__(
        self, config: AndersonConfig, comm: Communicator, group: ShardGroup | None = None
    ) -> None:
        self.config = config
        self.stats = Stats(enabled=config.enabled)
        self._stepping = False
        self.connect(comm, ShardGroup(comm) if group is None else group, calls=0)

    def connect(self, comm: Communicator, group: ShardGroup, calls: int) -> None:
        """Goes on with other ranks, and knows nothing but the settings and what `stats` counts.

        Not collective.

        Args:
            comm: the ranks that train together from now on.
            group: those of them that share one history.
            calls: number of the last step, the same on all of them.
        """
        self._comm, self._group, self._calls = comm, group, calls
        self._collectives = Collectives(comm, group, self.stats)
        self._replicas = Replicas(self.config, self._collectives)
        self._acceptance = Acceptance(self.config, self._collectives, self.stats)
        self._handover = Handover(self.config)
        self._note_method()
        self.agreed = False
        self._pending: ShardState | None = None  # a loaded history that is not taken in yet
        self.full_state: ShardState | None = None
        self._signature: Hashable = None
        self._made_for: Hashable = None  # sizes of the tensors, dtype and device
        self._decays: tuple[float, ...] | None = None  # what stored residuals contain, by group
        self._set_up(n=0, work=torch.float32, device=torch.device("cpu"))

    def _set_up(self, n: int, work: torch.dtype, device: torch.device) -> None:
        """Makes all that depends on the length, the dtype and the device of the weights."""
        config, (lo, hi) = self.config, self.share(n).rows
        graphs = config.cuda_graphs
        self._shard = WeightShard(
            self.share(n), work, device, self._collectives, self.stats, graphs
        )
        self._acceptance.use(self._shard)
        made = config, self._shard, self._collectives, self.stats, self._acceptance
        self._residual, self._subspace = ResidualNorm(*made), Subspace(*made, self._handover)
        kinds = config.averages if config.enabled else ()
        rows = hi - lo, work, device, self._shard.captures
        self._averages = WeightAverages(kinds, config.frequency, *rows)
        self._moving_average: MovingAverage | None = None
        if config.enabled and config.average_window is not None:
            self._moving_average = MovingAverage(config.average_window, hi - lo, work, device)
        self._persistence = Persistence(
            *(self._shard, self._residual, self._subspace, self._handover),
            *(self._acceptance, self._averages, self._moving_average),
            (self._comm.size, self._comm.rank),
        )
        self._use_kernels()

    @property
    def comm(self) -> Communicator:
        """The ranks that train together."""
        return self._comm

    @property
    def group(self) -> ShardGroup:
        """Of these, the ranks that share one history."""
        return self._group

    @property
    def _method(self) -> Method:
        """The method at work."""
        return self._subspace if self._handover.subspace else self._residual

    @property
    def history_bytes(self) -> int:
        """Bytes of history and of all averages allocated on this rank."""
        average = self._moving_average.nbytes if self._moving_average is not None else 0
        return self._method.nbytes + average + self._averages.nbytes

    @property
    def columns(self) -> int:
        """How many columns the history of the method at work holds now."""
        return self._method.columns

    def _prepare(self, problem: FixedPoint, within: bool = False) -> None:
        """Sets up the history for this problem, anew where it is no longer the same problem.

        Args:
            problem: what is accelerated.
            within: see `Schedule.within`.
        """
        if within and problem.unchanged(self._signature, *self._shard.rows):
            return
        signature, decays = problem.signature, problem.decays
        if self._decays is None or not self._method.decayed:
            self._decays = decays
        if signature == self._signature and _alike(decays, self._decays):
            return
        if self._signature is not None:
            self.reset(Reset.CHANGED)
            self._subspace.drop_jump()  # its rows are those of other parameters
        self._signature, self._decays = signature, decays
        # Of the whole: with FSDP2 the part of one rank may have changed, and not that of another.
        now = tuple(problem.sizes), work_dtype(problem), problem.device
        if now != self._made_for:
            self._made_for = now
            self._set_up(problem.n, *now[1:])
            problem.forget_buffers()  # views of the memory before would keep it alive

    def reset(self, cause: Reset = Reset.REQUESTED) -> None:
        """Forgets the history; it rebuilds itself in the next steps. On all ranks or none."""
        self.stats.resets[cause.value] += 1
        self._pending = self.full_state = self._decays = None
        self._acceptance.clear()
        self._method.reset()
        if self._moving_average is not None:
            self._moving_average.clear()
        if cause is not Reset.NONFINITE:
            self._averages.clear()

    def _reset_on_all(self) -> None:
        self.reset(Reset.DESYNCHRONIZED)
        self._method.restart_generation()

    def backup(self) -> Callable[[], None]:
        """Copies all that `reset` and `load_state` change, to host memory; the result puts it back.

        Costs nothing before the first step, and what `history_bytes` says after it.
        """
        counters = put_back_counters(self.stats)
        others = self._persistence.backup(self, self.stats, self._replicas)

        def put_back() -> None:
            others()
            counters()

        return put_back

    @property
    def has_shard_state(self) -> bool:
        """Whether `shard_state` is of use: not while ranks have yet to meet, unless one was loaded.

        Until then this rank's shard is the full state, which no rank should have to hold.
        """
        return not isinstance(self._comm, PendingCommunicator) or self._pending is not None

    def shard_state(self, problem: FixedPoint) -> ShardState:
        """This rank's shard of all that acceleration goes on from, in host memory.

        Not collective. `checkpoint` says what it looks like, and fits it to other shardings.
        """
        self._prepare(problem)
        if self._pending is not None:
            return copy.deepcopy(self._pending)
        return self._persistence.shard_state(self._calls, self._decays or ())

    def load_state(self, problem: FixedPoint, state: ShardState, fingerprint: int) -> None:
        """Makes a shard that fits this rank the pending history. Not collective.

        All ranks go on from it if all have loaded the same. `agree`, which the first step calls,
        finds out; after that, the next acceleration step, which then does not accelerate. In that
        case steps go on being counted as before, and what was on trial is forgotten.

        Args:
            problem: what is accelerated, as it was when the state was made.
            state: what `shard_state` returned, of this rank's rows and columns.
            fingerprint: in [1, 2^36), the same for all shards of one state.
        """
        self._prepare(problem)
        problem.forget_buffers()  # another method may be at work in this state
        self._pending, self._method.fingerprint = state, fingerprint
        if self._comm.size == 1 and not isinstance(self._comm, PendingCommunicator):
            self._load_pending(continues=True)

    def _load_pending(self, continues: bool) -> None:
        """Takes in the pending history; `continues`: as if the run had not been interrupted."""
        state, self._pending = self._pending, None
        assert state is not None
        if continues:
            self._calls = state.calls
        self._persistence.load_state(state, continues, self._calls)
        self._decays = state.decays or None
        self._note_method()
        self._use_kernels()

    def agree(self, problem: FixedPoint) -> None:
        """Takes in a loaded history if all ranks have loaded the same; else all reset theirs.

        Collective: one tiny reduction. The first step calls it. If a history was loaded on all
        ranks in the middle of a run, a call makes the very next step go on from it.
        """
        if self._pending is not None:
            self._prepare(problem)
        self.agreed = True
        same = self._replicas.agree(problem, self._method.fingerprint)
        self._use_kernels()
        if not same:
            self._reset_on_all()
        elif self._pending is not None:
            self._load_pending(continues=True)

    def _note_method(self) -> None:
        """Tells `stats` which method is at work."""
        self.stats.method = "subspace" if self._handover.subspace else "residual"
        self.stats.asleep = self._handover.asleep

    def _use_kernels(self) -> None:
        """Has `kernels` do the work where they can, if all ranks are able to."""
        self._averages.use_kernels = self._method.use_kernels(self._replicas.use_kernels)

    def compare_replicas(self, problem: FixedPoint) -> bool:
        """Whether all ranks hold the same weights. Collective."""
        with plain_numerics(problem.device):
            hash(problem.signature)
            return self._replicas.compare(problem)

    def check_memory(self, problem: FixedPoint) -> None:
        """Collective, before the first step.

        Raises:
            HistoryMemoryError: on every rank, if the history of any does not fit, or what the
                steps compute from it.
        """
        memory.check_fits(self.forecast(problem), self.config.history_depth, self._comm)

    def forecast(self, problem: FixedPoint) -> dict[torch.device, int]:
        """Bytes at most of all that grows with the depth, by device."""
        hash(problem.signature)  # brings the problem up to date with the parameter groups
        work, ranks = work_dtype(problem), self._comm.size
        return memory.forecast(self.config, self.share(problem.n), work, problem.device, ranks)

    def share(self, n: int) -> Sharding:
        """Which part of a history of n numbers a column is this rank's."""
        return sharding_of(self.config, self._group, n)

    @property
    def stepped_apart(self) -> bool:
        """Whether this rank's base optimizer has stepped by itself.

        Ranks whose has get weights and state of those whose has not.
        """
        return self._replicas.stepped_apart

    @stepped_apart.setter
    def stepped_apart(self, apart: bool) -> None:
        self._replicas.stepped_apart = apart


def _alike(decays: tuple[float, ...], others: tuple[float, ...]) -> bool:
    """Whether columns of residuals with one list of weight decays still serve for the other.

    A schedule may change them in every step. Stored residuals keep the decays that they began with,
    so that their differences are right. The point that they lead to is that of decays so near.
    """
    if len(decays) != len(others):
        return False
    pairs = zip(decays, others, strict=True)
    return all(abs(a - b) <= DECAY_TOLERANCE * max(abs(a), abs(b)) for a, b in pairs)
