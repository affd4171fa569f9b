"""From the shards of one sharding to those of another: merging, and who sends what to whom."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aadl_hvd.checkpoint.columns import columns_of
from aadl_hvd.checkpoint.format import check_format, readable
from aadl_hvd.checkpoint.shard_state import Origin, OwnState, ShardState, TrialState
from aadl_hvd.checkpoint.state import CELLS, COLUMNS, ROWS
from aadl_hvd.core.sharding import Sharding
from aadl_hvd.errors import CheckpointError


def merge_shards(shards: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The full state from what `sharded_state_dict` returned on all ranks.

    Args:
        shards: in any order. Where several groups of ranks hold the same, those of one group are
            enough.

    Returns:
        {"anderson": ...}, as each of them: `load_state_dict` takes it at any number of ranks and
        any layout, alone or in one dict with the base optimizer's state.

    Raises:
        CheckpointError: rows or columns are missing, the shards are not of one moment, or another
            version wrote them.
    """
    merger = Merger()
    anderson: dict[str, Any] | None = None
    with readable("shards"):
        for shard in shards:
            check_format("shards", shard["anderson"]["format"])
            anderson = anderson or dict(shard["anderson"])
            found = ShardState.from_dict(shard["anderson"]["history"], "history")
            trained = [shape for shape, _, trained in shard["anderson"]["parameters"] if trained]
            if found.sharding.n != sum(map(math.prod, trained)):
                raise CheckpointError(
                    "Invalid shards of parameters that fully_shard has sharded: each has rows of "
                    "its own. Must be loaded by the same rank of as many; save_history and "
                    "load_history of the optimizer go on with any number of ranks."
                )
            merger.add(found)
        if anderson is None:
            raise CheckpointError("Invalid shards=[]. Must be what sharded_state_dict() returned.")
        return {"anderson": anderson | {"history": merger.merged().to_dict()}}


class Merger:
    """Puts shards together, one after the other.

    Args:
        rows: half-open range of those wanted; None: all.
        index: columns wanted, counted from the oldest in use; None: all.

    Attributes:
        own: by rank, what it alone knew.
    """

    def __init__(
        self, rows: tuple[int, int] | None = None, index: Sequence[int] | None = None
    ) -> None:
        self._rows, self._index = rows or (0, 0), index or ()
        self._all_rows, self._all_columns = rows is None, index is None
        self._first: ShardState | None = None
        self._fingerprint = 0
        self._tensors: dict[str, Tensor] = {}
        self._residual, self._loss = True, True  # whether all shards can go back so
        self._covered: list[list[tuple[int, int]]] = []  # of every column wanted, and of the rows
        self.own: dict[str, OwnState] = {}

    def add(self, shard: ShardState) -> None:
        """Takes what is wanted of a shard.

        Raises:
            CheckpointError: it is of another moment than those before.
        """
        self.own |= shard.own
        if self._first is None:
            self._begin(shard)
        assert self._first is not None
        if shard.fingerprint() != self._fingerprint:
            raise CheckpointError(
                f"Invalid shards: after step {self._first.calls} of one run and after step "
                f"{shard.calls} of another, or of ranks that differed. Must be of one moment."
            )
        first, last = shard.sharding.rows
        lo, hi = max(first, self._rows[0]), min(last, self._rows[1])
        hi = max(lo, hi)
        here, there = (slice(lo - offset, hi - offset) for offset in (self._rows[0], first))
        places = {index: place for place, index in enumerate(self._index)}
        held = [(row, places[i]) for row, i in enumerate(shard.columns.index) if i in places]
        for place in (len(self._index), *(place for _, place in held)):
            self._covered[place].append((lo, hi))
        trial = shard.trial
        self._residual &= trial is not None and trial.residual is not None
        self._loss &= trial is not None and trial.loss
        found = {name: (kind, tensor) for name, kind, tensor in shard.tensors()}
        for name in self._tensors.keys() - found.keys():
            del self._tensors[name]  # a rank has lost it
        for name, merged in self._tensors.items():
            kind, tensor = found[name]
            if kind == ROWS:
                merged[..., here] = tensor[..., there]
            for row, place in () if kind == ROWS else held:
                if kind == CELLS:
                    merged[place, here] = tensor[row][there]
                else:
                    merged[place] = tensor[row]

    def _begin(self, shard: ShardState) -> None:
        self._first, self._fingerprint = shard, shard.fingerprint()
        if self._all_rows:
            self._rows = 0, shard.sharding.n
        if self._all_columns:
            self._index = range(shard.columns.count)
        n, h = self._rows[1] - self._rows[0], len(self._index)
        for name, kind, tensor in shard.tensors():
            shape = {
                ROWS: (*tensor.shape[:-1], n),
                CELLS: (h, n),
                COLUMNS: (h, *tensor.shape[1:]),
            }
            self._tensors[name] = torch.zeros(shape[kind], dtype=tensor.dtype, device="cpu")
        self._covered = [[] for _ in range(h + 1)]

    def merged(self) -> ShardState:
        """What the shards make.

        Raises:
            CheckpointError: rows or columns are missing.
        """
        first, h = self._first, len(self._index)
        if first is None:
            raise CheckpointError("Invalid shards: there are none.")
        n, size = first.sharding.n, first.sharding.size
        for place in (h, *range(h)):
            if missing := _gaps(self._covered[place], self._rows):
                rows = ", ".join(f"{lo} to {hi - 1}" for lo, hi in missing)
                column = -1 if place == h else self._index[place]
                what = "" if place == h else f" of column {column}, counted from the oldest,"
                raise CheckpointError(
                    f"Invalid shards: rows {rows}{what} of {n} are missing. Must be the shards of "
                    f"all {size} ranks that shared the history."
                )
        lost = {name: None for name, _, _ in first.tensors()}
        trial, tensors = first.trial, lost | self._tensors
        if trial is not None:
            base = tensors.pop("trial.base")
            residual = trial.residual if self._residual else None
            if base is None or not (residual or self._loss):
                trial = None
            else:
                trial = TrialState(base=base, residual=residual, loss=self._loss)
        merged = dataclasses.replace(first, trial=trial).with_tensors(tensors)
        return dataclasses.replace(
            merged,
            sharding=Origin(layout="rows", n=n, size=1, rank=0, rows=self._rows),
            columns=dataclasses.replace(merged.columns, index=tuple(self._index)),
            own=self.own,
        )


def _gaps(covered: list[tuple[int, int]], wanted: tuple[int, int]) -> list[tuple[int, int]]:
    """The rows wanted that none of the ranges holds."""
    (end, last), missing = wanted, []
    for lo, hi in [*sorted(covered), (last, last)]:
        if lo > end:
            missing.append((end, lo))
        end = max(end, hi)
    return missing


@dataclasses.dataclass(frozen=True)
class Held:
    """What a rank can say of a shard it holds, without handing it out.

    Attributes:
        fingerprint: of the moment, and which tensors it has.
        at: the rank that holds it.
        place: its place among that rank's shards.
        rows: half-open range.
        index: its columns, counted from the oldest in use.
        holds: whether anything is stored.
        stored: pairs stored since the last reset.
        columns: how many are in use.
        size: how many ranks shared the history.
        rank: whose shard it was among them.
    """

    fingerprint: str
    at: int
    place: int
    rows: tuple[int, int]
    index: frozenset[int]
    holds: bool
    stored: int
    columns: int
    size: int
    rank: int

    @classmethod
    def of(cls, shard: ShardState, at: int, place: int) -> Held:
        """Of a shard that rank `at` holds, the one at `place` among its shards."""
        trial, names = shard.trial, sorted(name for name, _, _ in shard.tensors())
        ways = None if trial is None else (trial.residual is not None, trial.loss)
        # The layout decides whether there are products; the rank that needs them can make them.
        names = [name for name in names if name != "gram.products"]
        return cls(
            fingerprint=f"{shard.fingerprint()} {names} {ways}",
            at=at,
            place=place,
            rows=shard.sharding.rows,
            index=frozenset(shard.columns.index),
            holds=shard.holds,
            stored=shard.columns.stored,
            columns=shard.columns.count,
            size=shard.sharding.size,
            rank=shard.sharding.rank,
        )


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows and columns of a shard that go to a rank."""

    source: Held
    to: int
    rows: tuple[int, int]
    index: frozenset[int]


_ROWS = -1  # stands for what a shard holds beside columns


def plan(known: Sequence[Held], wanted: Sequence[Sharding]) -> list[Piece] | None:
    """Which pieces go where, the same on every rank; None if nobody has some of them.

    A rank takes what it has itself, and the rest from those that come after it, so that several
    that hold the same each hand out some of it.

    Args:
        known: the shards of one moment.
        wanted: by rank, which rows and columns it needs.
    """
    pieces: list[Piece] = []
    for to, sharding in enumerate(wanted):
        columns = columns_of(known[0].stored, known[0].columns, sharding)
        gaps = [(*sharding.rows, frozenset([_ROWS, *columns]))]
        turned = [p for p in known if p.at >= to] + [p for p in known if p.at < to]
        if sharding.rows[0] == sharding.rows[1]:  # more ranks than rows
            pieces.append(Piece(turned[0], to, sharding.rows, gaps.pop()[2]))
        for shard in turned:
            if not gaps:
                break
            left = []
            for lo, hi, index in gaps:
                first, last = max(lo, shard.rows[0]), min(hi, shard.rows[1])
                found = index & (shard.index | {_ROWS})
                if first >= last or not found:
                    left.append((lo, hi, index))
                    continue
                pieces.append(Piece(shard, to, (first, last), found))
                rest = (lo, first, index), (last, hi, index), (first, last, index - found)
                left += [gap for gap in rest if gap[0] < gap[1] and gap[2]]
            gaps = left
        if gaps:
            return None
    return pieces
