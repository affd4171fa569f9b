"""What acceleration goes on from: the state of one rank, as a typed value.

`ShardState` is the shard of one rank: its rows of its columns, and what all ranks share. The full
state is the shard of a rank alone: all rows of all columns. Slots of the ring buffer appear
nowhere. So a shard fits any depth, layout and number of ranks whose rows and columns it covers.

Each field says in its annotation how it is divided among ranks, and what it must look like: see
`checkpoint.state`. The check, the cut, the fit and the merge (`reshard`) follow from that. A new
field touches two files: this one, where it is a line and perhaps one more in `check`, and the file
of the class in core that owns it, in its `state` and `load_state`. Then raise `FORMAT`: an older
file lacks the field.

`to_dict` and `from_dict` translate to what files hold: dicts, lists, numbers, texts and tensors.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from aadl_hvd.checkpoint.columns import columns_of, products_of
from aadl_hvd.checkpoint.history_state import ColumnsState, GramState
from aadl_hvd.checkpoint.state import (
    CELLS,
    COLUMNS,
    OWN,
    ROWS,
    SHARED,
    Nested,
    State,
    agree,
    check_optional,
)
from aadl_hvd.checkpoint.subspace_state import HandoverState, OwnBlockState, SubspaceState
from aadl_hvd.core.sharding import Sharding
from aadl_hvd.errors import CheckpointError
from aadl_hvd.schema import (
    anything,
    entries,
    every,
    instance,
    integer,
    listed,
    number,
    one_of,
    optional,
    sequence,
    tensor,
)

_DOUBLE = (torch.float64,)
_MATRIX, _LOSS = tensor(None, None), number(finite=False)
_UNDO = entries({"entries": every(instance(dict), key=integer())})


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Origin(State):
    """Whose rows and columns a shard has: those of rank `rank` of `size` that share a history."""

    layout: Annotated[str, OWN, one_of("rows", "columns")]
    n: Annotated[int, OWN, integer()]
    size: Annotated[int, OWN, integer(1)]
    rank: Annotated[int, OWN, integer()]
    rows: Annotated[tuple[int, int], OWN, listed(integer(), 2)]  # half-open range


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class AveragesState(State):
    """The running averages: see `core.averages.WeightAverages`.

    Attributes:
        decays: decay factor of each, per step.
        every: steps between two iterates.
        gains: smoothed gain of each.
        measured: how often the gains were measured.
        count: iterates taken in.
        means: averages of w and r, [len(decays), 2, rows]; None while `count` is 0.
    """

    decays: Annotated[tuple[float, ...], SHARED, listed(number(0.0))]
    every: Annotated[int, SHARED, integer(1)]
    gains: Annotated[tuple[float, ...], SHARED, listed(number())]
    measured: Annotated[int, SHARED, integer()]
    count: Annotated[int, SHARED, integer()]
    means: Annotated[Tensor | None, ROWS, anything]

    def _check(self, rows: int) -> None:
        same = len(self.decays) == len(self.gains)
        agree("averages: decays, gains", same)
        check = tensor(len(self.decays), 2, rows, finite=True)
        check_optional(self.means, "averages.means", bool(self.count), check)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class WindowState(State):
    """The moving average's window: iterates seen, and the last of them, [at most t, rows]."""

    pushed: Annotated[int, SHARED, integer()]
    iterates: Annotated[Tensor, ROWS, anything]

    def _check(self, rows: int) -> None:
        tensor(None, rows)(self.iterates, "history['window']['iterates']")
        agree("window: pushed, iterates", len(self.iterates) <= self.pushed)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class NoiseState(State):
    """Share of noise in ||r||^2; None: not known. It may be below 0 by rounding.

    `open`: attempts in a row in which a guess of the noise has opened the gate.
    """

    GUESSES: ClassVar[int] = 3

    share: Annotated[float | None, SHARED, optional(number(-1.0, 1.0))]
    open: Annotated[int, SHARED, integer(0, GUESSES)]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LossState(State):
    """What all ranks know of a point on trial: see `core.loss_check.LossCheck`."""

    observed: Annotated[bool, SHARED, instance(bool)]
    verdict_due: Annotated[bool, SHARED, instance(bool)]
    loss: Annotated[float, SHARED, _LOSS]
    tolerance: Annotated[float, SHARED, number(0.0, finite=False)]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BackoffState(State):
    """Acceleration steps to leave out now and after a rejection, and the share of rejected ones."""

    FIRST: ClassVar[int] = 4
    LONGEST: ClassVar[int] = 64

    left_out: Annotated[int, SHARED, integer(0, LONGEST)]
    following: Annotated[int, SHARED, integer(FIRST, LONGEST)]
    rejected: Annotated[float, SHARED, number(0.0, 1.0)]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ResidualTrial(State):
    """The way back from a step that the next residual judges: ||r||, the base's state."""

    norm: Annotated[float, OWN, number(0.0)]
    undo: Annotated[dict[str, Any], OWN, _UNDO]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TrialState(State):
    """An accelerated step that has yet to be confirmed.

    Attributes:
        base: rows of the weights that the base optimizer had reached, [rows].
        residual: what else the next residual needs to judge it; None: it does not judge.
        loss: whether the next losses judge it.
    """

    base: Annotated[Tensor, ROWS, anything]
    residual: Annotated[ResidualTrial | None, OWN, Nested(ResidualTrial, optional=True)]
    loss: Annotated[bool, OWN, instance(bool)]

    def _check(self, rows: int) -> None:
        tensor(rows)(self.base, "history['trial']['base']")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class OwnNoiseState(State):
    """What one rank's gradients deviated by: see `core.noise.NoiseMeter`."""

    call: Annotated[int, OWN, integer(-1)]
    now: Annotated[tuple[Tensor, Tensor] | None, OWN, optional(sequence(_MATRIX, tensor()))]
    changes: Annotated[
        tuple[tuple[int, Tensor], ...], OWN, listed(sequence(integer(), _MATRIX), most=2)
    ]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class OwnLossState(State):
    """What one rank knows of its losses, which may be any numbers."""

    SPREADS: ClassVar[int] = 20  # how many variances are kept

    losses: Annotated[tuple[tuple[float, ...], ...], OWN, listed(listed(_LOSS), most=2)]
    variances: Annotated[tuple[float, ...], OWN, listed(number(0.0), most=SPREADS)]
    last_difference: Annotated[float | None, OWN, optional(_LOSS)]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class OwnState(State):
    """What one rank alone knew of its gradients and losses."""

    noise: Annotated[OwnNoiseState, OWN, Nested(OwnNoiseState)]
    losses: Annotated[OwnLossState, OWN, Nested(OwnLossState)]
    block: Annotated[OwnBlockState | None, OWN, Nested(OwnBlockState, optional=True)]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ShardState(State):
    """All that acceleration goes on from on one rank, in host memory.

    Attributes:
        sharding: whose rows and columns these are.
        calls: number of the last step.
        ranks: how many ranks trained together.
        decays: the weight decay of each parameter group in stored residuals.
        window: None where there is no moving average.
        subspace: None where the subspace method is not at work.
        trial: None where no step has yet to be confirmed.
        own: by rank, what it alone knew.
    """

    sharding: Annotated[Origin, OWN, Nested(Origin)]
    calls: Annotated[int, SHARED, integer()]
    ranks: Annotated[int, OWN, integer(1)]
    decays: Annotated[tuple[float, ...], SHARED, listed(number())]
    columns: Annotated[ColumnsState, SHARED, Nested(ColumnsState)]
    gram: Annotated[GramState, SHARED, Nested(GramState)]
    averages: Annotated[AveragesState, SHARED, Nested(AveragesState)]
    window: Annotated[WindowState | None, SHARED, Nested(WindowState, optional=True)]
    noise: Annotated[NoiseState, SHARED, Nested(NoiseState)]
    losses: Annotated[LossState, SHARED, Nested(LossState)]
    backoff: Annotated[BackoffState, SHARED, Nested(BackoffState)]
    handover: Annotated[HandoverState, SHARED, Nested(HandoverState)]
    subspace: Annotated[SubspaceState | None, SHARED, Nested(SubspaceState, optional=True)]
    trial: Annotated[TrialState | None, OWN, Nested(TrialState, optional=True)]
    own: Annotated[dict[str, OwnState], OWN, Nested(OwnState, each=True)]

    @property
    def holds(self) -> bool:
        """Whether either method has stored anything."""
        blocks = None if self.subspace is None else self.subspace.blocks
        return bool(self.columns.stored or (blocks is not None and (blocks.stored or blocks.steps)))

    def check(self) -> None:
        """Raises a CheckpointError where no run could go on from this.

        Columns and iterates may hold NaN, as those of a run that has seen one: the next accelerated
        step resets the history. What would never heal must be finite.
        """
        (lo, hi), found = self.sharding.rows, self.sharding
        agree("sharding", lo <= hi <= found.n and found.rank < found.size)
        rows = hi - lo
        self.columns.check(rows)
        self.gram.check(self.columns)
        self.averages._check(rows)
        if self.subspace is not None:
            self.subspace.check(rows, self.handover.late)
        for state in (self.window, self.trial):
            if state is not None:
                state._check(rows)

    def cut(self, rows: tuple[int, int], index: frozenset[int]) -> ShardState:
        """Some rows and columns, without what ranks know alone.

        Args:
            rows: half-open range; what of it is here is taken.
            index: columns, counted from the oldest in use; those that are here are taken.
        """
        held = [place for place, i in enumerate(self.columns.index) if i in index]
        cut = self._taken(rows, held)
        columns = dataclasses.replace(
            cut.columns, index=tuple(self.columns.index[place] for place in held)
        )
        sharding = dataclasses.replace(self.sharding, rows=rows)
        return dataclasses.replace(cut, sharding=sharding, columns=columns, own={})

    def _taken(self, rows: tuple[int, int], held: list[int]) -> ShardState:
        """Copies of some rows of some columns, given by their places here."""
        first, last = self.sharding.rows
        here = slice(max(rows[0] - first, 0), max(min(rows[1], last) - first, 0))
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            ROWS: lambda t: t[..., here].clone(),
            COLUMNS: lambda t: t[held],
            CELLS: lambda t: t[held, here],
        }
        return self.with_tensors({name: ways[kind](t) for name, kind, t in self.tensors()})

    def fit(self, sharding: Sharding, ranks: int, rank: int) -> ShardState:
        """The shard of a rank, cut out of a shard that covers it, such as the full state. A copy.

        With a smaller depth the newest columns are kept.

        Args:
            sharding: whose rows and columns are wanted.
            ranks: how many ranks train together.
            rank: this one among them.

        Raises:
            CheckpointError: of another n, not all rows or columns are there, or it is damaged.
        """
        self.check()
        found, columns, (lo, hi) = self.sharding, self.columns, sharding.rows
        first, last = found.rows
        if found.n != sharding.n:
            raise CheckpointError(
                f"Invalid history of n={found.n} numbers. Must have n={sharding.n}, as this model."
            )
        shard = f"Invalid history: it is the shard of rank {found.rank} of {found.size}"
        if lo < hi and not (first <= lo and hi <= last):
            raise CheckpointError(
                f"{shard}, rows {first} to {last - 1}, and this rank needs {lo} to {hi - 1}. Must "
                "cover them: merge_shards makes the full state of all shards."
            )
        wanted = columns_of(columns.stored, columns.count, sharding)
        places = {index: place for place, index in enumerate(columns.index)}
        if absent := [i for i in wanted if i not in places]:
            raise CheckpointError(
                f"{shard} and lacks {len(absent)} columns that this rank needs. Must cover them: "
                "merge_shards makes the full state of all shards."
            )
        dropped, held = max(0, columns.count - sharding.depth), [places[i] for i in wanted]
        products = None
        if sharding.layout == "columns":
            fresh = [(k, i) for k, i in enumerate(self.gram.fresh) if i >= dropped]
            if self.gram.products is not None:
                products = self.gram.products[held][:, [k for k, _ in fresh]]
            else:
                products = products_of(columns.r, held, [places[i] for _, i in fresh])
        taken = self._taken((lo, hi), held)
        own = self.own.get(str(rank)) if self.ranks == ranks else None
        return dataclasses.replace(
            taken,
            sharding=origin_of(sharding),
            ranks=ranks,
            columns=dataclasses.replace(
                taken.columns,
                count=columns.count - dropped,
                index=tuple(i - dropped for i in wanted),
            ),
            gram=self.gram.fit(dropped, products),
            trial=copy.deepcopy(taken.trial),
            own={} if own is None else {str(rank): copy.deepcopy(own)},
        )


def origin_of(sharding: Sharding) -> Origin:
    """Whose rows and columns the shard of a rank has."""
    names = ("layout", "n", "size", "rank", "rows")
    return Origin(**{name: getattr(sharding, name) for name in names})
