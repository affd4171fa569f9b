"""What acceleration goes on from, on disk and between machine sizes.

A history travels in parts, plain dicts of tensors on the host and of plain types:

    "sharding"     {"layout", "n", "size", "rank", "rows": [lo, hi]} of whom the part was
    "replicated"   what is the same on every rank: numbers of steps, R^T R, decisions of late
    "rows"         {name: tensor [..., hi - lo]}: the last pair, sums of averages, ...
    "columns"      "index", the columns in use that it holds, counted from the oldest; "y" and "r",
                   [len(index), hi - lo]; "weights", "products": see History and Gram
    "undo"         the base optimizer's state from before a step that is still on trial
    "ranks"        how many ranks trained together
    "own"          {rank: what that rank alone knew of its gradients and losses}

The whole history is the part of a rank alone: all rows of all columns. Slots of the ring buffer
appear nowhere, so that a part fits any depth, layout and number of ranks whose rows and columns it
covers (`examined`), and parts of any sharding make the whole (`merge_shards`).

Files are written whole or not at all and hold tensors and plain types alone (`aadl_hvd.checkpoint.plain`):
reading one runs none of its code.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadl_hvd.checkpoint.plain import plain
from aadl_hvd.comm.base import Communicator
from aadl_hvd.core.acceptance import Backoff, LossWatch
from aadl_hvd.core.averages import WeightAverages
from aadl_hvd.core.history import chunks
from aadl_hvd.core.noise import NoiseMeter
from aadl_hvd.core.sharding import Sharding
from aadl_hvd.errors import AndersonError, CheckpointError
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
    refuse,
    sequence,
    tensor,
)
from aadl_hvd.stats import Stats

FORMAT = 2  # of the entry "anderson" of a state_dict; 1 had no history
_FILE_FORMAT = 1
_MARK = "aadl_hvd_file"
_LARGE = 2**16  # bytes from which a tensor travels by itself
_ELSEWHERE = "tensor sent after this"

History = dict[str, Any]

# What a state_dict's entry "anderson" looks like; tensors of a history: see `_check_part`.
_ENTRY = entries(
    {"counters": anything},
    {
        "config": instance(dict),
        "parameters": listed(sequence(listed(integer()), instance(str), instance(bool))),
        "settings": listed(listed(number())),
        "last_rates": listed(number()),
    },
)
_WITH_HISTORY = entries(
    dict.fromkeys(("config", "parameters", "settings", "last_rates", "history"), anything)
)
_UNDO = entries({"entries": every(instance(dict), key=integer())})
_PART = entries(
    {
        "sharding": entries(
            {
                "layout": one_of("rows", "columns"),
                **{"n": integer(), "size": integer(1), "rank": integer()},
                "rows": listed(integer(), 2),
            }
        ),
        "replicated": entries(
            {
                **{"calls": integer(), "stored": integer(), "columns": integer()},
                "last": integer(0, 1),
                "gram": entries(
                    {
                        **{"matrix": anything, "carried": anything},
                        **{"fresh": listed(integer()), "drift": number(0.0)},
                    }
                ),
                "averages": WeightAverages.STATE,
                "pushed": optional(integer()),
                "noise": optional(NoiseMeter.SHARE),
                "losses": LossWatch.STATE,
                "backoff": Backoff.STATE,
            }
        ),
        "rows": instance(dict),
        "columns": entries({"index": listed(integer())}),
        "undo": entries(
            {},
            {
                "residual": entries({"norm": number(0.0), "undo": _UNDO}),
                "loss": entries({}),
            },
        ),
        "ranks": integer(1),
        "own": instance(dict),
    }
)
_OWN = entries({"noise": NoiseMeter.PART, "losses": LossWatch.PART})


# Files


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint so that `path` holds the old one or the new one, whole.

    What is saved can be loaded: what has a plain equal is written as that, the rest is refused.

    - As they are: None, bool, int up to 2039 bits, float, complex, str, bytes; dict, OrderedDict,
      Counter, list, tuple, set of these; tensors, sparse and quantized ones too, and parameters,
      with their attributes; torch.Size, dtypes, devices.
    - NumPy's numbers become Python's, NumPy's arrays tensors of the same dtype. NumPy's random
      states can be set again with what `load` returns.
    - Paths become str. Other classes derived from the above, such as IntEnum, defaultdict,
      namedtuple or a class of tensors, become what they are derived from; frozenset becomes set.
    - Keys of dicts are numbers, texts, bytes, None, dtypes, devices, and tuples of these.
    - Refused: other objects, such as namespaces, dates, plain enums, functions; tensors without
      numbers of their own (DTensor, meta device); what contains itself or is 64 levels deep.

    Args:
        path: file to write; its folder must exist. Other ranks, other paths.
        state: as above; it is not changed, and tensors are not copied. `torch.load` reads the
            file, too.

    Raises:
        CheckpointError: an entry is refused: says where it is, its type, and what to save instead.
        OSError: the disk is full, the folder is missing.
        In either case what was at `path` is still there.
    """
    path = Path(path)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"Invalid state, of type {type(state).__name__}. Must be a dict.")
    content = plain(dict(state), "state")
    mark = content.setdefault(_MARK, _FILE_FORMAT)  # torch.load leaves it in what it reads
    if type(mark) is not int or mark != _FILE_FORMAT:
        raise CheckpointError(f"Invalid state[{_MARK!r}]. Must be absent: the name is taken.")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except RuntimeError as error:  # torch trips over the file that it cannot finish
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        partial.unlink(missing_ok=True)
    # The new name is on disk only when the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save` wrote, to host memory.

    Raises:
        CheckpointError: missing, damaged, not written by `save`, or by a newer version.
    """
    try:
        with zipfile.ZipFile(path) as file:  # torch does not look at the checksums it writes
            if (entry := file.testzip()) is not None:
                raise CheckpointError(f"cannot read checkpoint {path}: {entry} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"no such checkpoint: {path}") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, not a checkpoint") from None
    except Exception as error:  # the unpickler trips over garbage in many ways
        raise CheckpointError(f"cannot read checkpoint {path}: {_why_unread(error)}") from error
    if not isinstance(state, dict) or _MARK not in state:
        raise CheckpointError(f"{path} was not written by aadl_hvd.checkpoint.save")
    _check_format(f"format of {path}", state.pop(_MARK), _FILE_FORMAT)
    return state


def _why_unread(error: Exception) -> str:
    """In one line; torch explains at length what else could be done."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return (
            f"it holds {found[1]}, and only tensors and plain values are read. If you trust the "
            "file: state = torch.load(path, weights_only=False), which runs its code, and "
            "aadl_hvd.checkpoint.save(path, state)"
        )
    if found := re.search(r"WeightsUnpickler error:\s*(.+)", text):
        text = found[1]
    return text.partition("\n")[0] or type(error).__name__


# Between shardings


def merge_shards(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole history from what `sharded_state_dict` returned on all ranks.

    Args:
        parts: in any order. Where several groups of ranks hold the same, one group's will do.

    Returns:
        {"anderson": ...}, as each of them: `load_state_dict` takes it at any number of ranks and
        any layout, alone or in one dict with the base optimizer's state.

    Raises:
        CheckpointError: rows or columns are missing, or the parts are not of one moment.
    """
    whole = _Whole()
    anderson: dict[str, Any] | None = None
    with readable("parts"):
        for part in parts:
            anderson = anderson or dict(part["anderson"])
            whole.add(part["anderson"]["history"])
    if anderson is None:
        raise CheckpointError("Invalid parts=[]. Must be what sharded_state_dict() returned.")
    return {"anderson": anderson | {"history": whole.finished()}}


class _Whole:
    """Parts put together, one after the other.

    Args:
        rows: half-open range of those wanted; None: all.
        index: columns wanted, counted from the oldest; None: all.
    """

    def __init__(
        self, rows: tuple[int, int] | None = None, index: Sequence[int] | None = None
    ) -> None:
        self._wanted, self._index = rows, index
        self._first: History | None = None
        self._fingerprint = 0
        self._rows: dict[str, Tensor] = {}
        self._columns: dict[str, Any] = {}
        self._undo: dict[str, Any] = {}
        self._own: dict[str, Any] = {}
        self._covered: list[list[tuple[int, int]]] = []  # of every column wanted, and of the rows

    def add(self, part: History) -> None:
        self._own |= part["own"]
        if "rows" not in part:
            return
        columns, rows = part["columns"], part["rows"]
        if self._first is None:
            self._begin(part)
        assert self._first is not None and self._wanted is not None and self._index is not None
        first, last = part["sharding"]["rows"]
        lo, hi = max(first, self._wanted[0]), min(last, self._wanted[1])
        hi = max(lo, hi)
        here = slice(lo - self._wanted[0], hi - self._wanted[0])
        there = slice(lo - first, hi - first)
        if fingerprint_of(part) != self._fingerprint:
            calls = self._first["replicated"]["calls"], part["replicated"]["calls"]
            raise CheckpointError(
                f"Invalid parts: after step {calls[0]} of one run and after step {calls[1]} of "
                "another, or of ranks that differed. Must be of one moment."
            )
        self._undo = {name: undo for name, undo in self._undo.items() if name in part["undo"]}
        self._covered[-1].append((lo, hi))
        for name in list(self._rows):
            if name in rows:
                self._rows[name][..., here] = rows[name][..., there]
            else:
                del self._rows[name]  # a rank has lost it
        if columns["products"] is None:
            self._columns["products"] = None
        places = {index: place for place, index in enumerate(self._index)}
        for row, index in enumerate(columns["index"]):
            if (place := places.get(index)) is None:
                continue
            self._covered[place].append((lo, hi))
            for name in ("r", "y"):
                self._columns[name][place, here] = columns[name][row][there]
            self._columns["weights"][place] = columns["weights"][row]
            if self._columns["products"] is not None:
                self._columns["products"][place] = columns["products"][row]

    def _begin(self, part: History) -> None:
        self._first, self._fingerprint = part, fingerprint_of(part)
        if self._wanted is None:
            self._wanted = 0, part["sharding"]["n"]
        if self._index is None:
            self._index = range(part["replicated"]["columns"])
        n, h = self._wanted[1] - self._wanted[0], len(self._index)
        self._rows = {
            name: tensor.new_empty((*tensor.shape[:-1], n)) for name, tensor in part["rows"].items()
        }
        columns, fresh = part["columns"], len(part["replicated"]["gram"]["fresh"])
        like = columns["y"]
        self._columns = {
            "y": like.new_empty((h, n)),
            "r": like.new_empty((h, n)),
            "weights": torch.zeros(h, dtype=torch.float64, device="cpu"),
            "products": torch.zeros((h, fresh), dtype=torch.float64, device="cpu"),
        }
        self._undo = dict(part["undo"])
        self._covered = [[] for _ in range(h + 1)]

    def finished(self) -> History:
        assert self._first is not None and self._wanted is not None and self._index is not None
        first = self._first
        n, h = first["sharding"]["n"], len(self._index)
        for place in (h, *range(h)):
            if missing := _gaps(self._covered[place], self._wanted):
                rows = ", ".join(f"{lo} to {hi - 1}" for lo, hi in missing)
                index = -1 if place == h else self._index[place]
                what = "" if place == h else f" of column {index}, counted from the oldest,"
                raise CheckpointError(
                    f"Invalid parts: rows {rows}{what} of {n} are missing. Must be the parts of "
                    f"all {first['sharding']['size']} ranks that shared the history."
                )
        return {
            "sharding": {"layout": "rows", "n": n, "size": 1, "rank": 0, "rows": [*self._wanted]},
            "replicated": first["replicated"],
            "rows": self._rows,
            "columns": {"index": [*self._index], **self._columns},
            "undo": self._undo,
            "ranks": first["ranks"],
            "own": self._own,
        }


def _gaps(covered: list[tuple[int, int]], wanted: tuple[int, int]) -> list[tuple[int, int]]:
    """The rows wanted that none of the ranges holds."""
    (end, last), missing = wanted, []
    for lo, hi in [*sorted(covered), (last, last)]:
        if lo > end:
            missing.append((end, lo))
        end = max(end, hi)
    return missing


def _fitted(history: History, sharding: Sharding, ranks: int, rank: int) -> History:
    """The part of a rank, cut out of a part that covers it, such as the whole. A copy.

    With a smaller depth the newest columns are kept.

    Args:
        history: any part.
        sharding: whose rows and columns are wanted.
        ranks: how many ranks train together.
        rank: this one among them.

    Raises:
        CheckpointError: of another n, not all rows or columns are there, or it is damaged.
    """
    _check_part(history)
    found, same, columns = history["sharding"], history["replicated"], history["columns"]
    lo, hi = sharding.rows
    first, last = found["rows"]
    if found["n"] != sharding.n:
        raise CheckpointError(
            f"Invalid history of n={found['n']} numbers. Must have n={sharding.n}, as this model."
        )
    if lo < hi and not (first <= lo and hi <= last):
        raise CheckpointError(
            f"Invalid history: it is the part of rank {found['rank']} of {found['size']}, rows "
            f"{first} to {last - 1}, and this rank needs {lo} to {hi - 1}. Must cover them: "
            "merge_shards makes the whole of all parts."
        )
    cut = slice(max(lo - first, 0), max(hi - first, 0))
    dropped = max(0, same["columns"] - sharding.depth)
    h = same["columns"] - dropped
    matrix, carried = same["gram"]["matrix"], same["gram"]["carried"]
    index = [i - dropped for i in _columns_wanted(same["stored"], same["columns"], sharding)]
    places = {held - dropped: place for place, held in enumerate(columns["index"])}
    if absent := [i for i in index if i not in places]:
        raise CheckpointError(
            f"Invalid history: it is the part of rank {found['rank']} of {found['size']} and "
            f"lacks {len(absent)} columns that this rank needs. Must cover them: merge_shards "
            "makes the whole of all parts."
        )
    held = [places[i] for i in index]
    fresh = [i for i in same["gram"]["fresh"] if i >= dropped]
    products = None
    if sharding.layout == "columns":
        if columns["products"] is not None:
            kept = [k for k, i in enumerate(same["gram"]["fresh"]) if i >= dropped]
            products = columns["products"][held][:, kept]
        else:
            products = _products(columns, held, [places[i - dropped] for i in fresh])
    own = history["own"].get(str(rank)) if history["ranks"] == ranks else None
    optional(_OWN)(own, f"history['own']['{rank}']")
    return {
        "sharding": {
            "layout": sharding.layout,
            "n": sharding.n,
            "size": sharding.size,
            "rank": sharding.rank,
            "rows": [lo, hi],
        },
        "replicated": copy.deepcopy(same)
        | {
            "columns": h,
            "gram": {
                "matrix": matrix[dropped:, dropped:].clone(),
                "fresh": [i - dropped for i in fresh],
                "carried": None if carried is None else carried[dropped:].clone(),
                "drift": same["gram"]["drift"],
            },
        },
        "rows": {name: tensor[..., cut].clone() for name, tensor in history["rows"].items()},
        "columns": {
            "index": index,
            "y": columns["y"][held, cut],
            "r": columns["r"][held, cut],
            "weights": columns["weights"][held],
            "products": products,
        },
        "undo": copy.deepcopy(history["undo"]),
        "ranks": ranks,
        "own": {} if own is None else {str(rank): copy.deepcopy(own)},
    }


def _check_part(history: Any) -> None:
    """Raises a CheckpointError where a part is not what all that takes it in can go on from.

    Columns and iterates may hold NaN, as those of a run that has seen one: the next accelerated
    step resets the history. What would never heal must be finite.
    """
    _PART(history, "history")
    found, same, columns = history["sharding"], history["replicated"], history["columns"]
    (lo, hi), h, stored, pushed = found["rows"], same["columns"], same["stored"], same["pushed"]
    averages, index, fresh = same["averages"], columns["index"], same["gram"]["fresh"]
    numbers = {
        "sharding": lo <= hi <= found["n"] and found["rank"] < found["size"],
        "replicated: stored, columns": h < stored or h == stored == 0,
        "replicated: fresh": len({*fresh}) == len(fresh) and all(i < h for i in fresh),
        "replicated: averages": averages["measured"] <= averages["count"]
        and len(averages["kinds"]) == len(averages["gains"]),
        "columns: index": index == sorted({*index}) and all(i < h for i in index),
    }
    _raise_contradictions(numbers)
    rows, held, double = hi - lo, len(index), (torch.float64,)
    wanted = {"pair": tensor(2, rows)} if stored else {}
    if pushed is not None:
        wanted["iterates"] = tensor(None, rows)
    if averages["count"]:
        wanted |= {f"average {kind}": tensor(2, rows, finite=True) for kind in averages["kinds"]}
    tensors = {
        "replicated": entries(
            {
                "gram": entries(
                    {
                        "matrix": tensor(h, h, dtypes=double, finite=True),
                        "carried": optional(tensor(h, dtypes=double, finite=True)),
                    }
                )
            }
        ),
        "rows": entries(wanted, {"base": tensor(rows)}, others=_unknown),
        "columns": entries(
            {
                **{"y": tensor(held, rows), "r": tensor(held, rows)},
                "weights": tensor(held, dtypes=double, finite=True),
                "products": optional(tensor(held, len(fresh), dtypes=double)),
            }
        ),
    }
    entries(tensors)(history, "history")
    matrix = same["gram"]["matrix"]
    _raise_contradictions(
        {
            "matrix": torch.equal(matrix, matrix.T) and bool((matrix.diagonal() >= 0.0).all()),
            "columns: y, r": columns["y"].dtype == columns["r"].dtype,
            "pushed, iterates": pushed is None or len(history["rows"]["iterates"]) <= pushed,
        }
    )


def _raise_contradictions(sound: Mapping[str, bool]) -> None:
    if wrong := [name for name, ok in sound.items() if not ok]:
        raise CheckpointError(
            f"Invalid history: it is damaged, its numbers contradict each other ({wrong[0]})."
        )


def _unknown(value: Any, name: str) -> None:
    refuse(value, name, "absent, for nothing else in the history speaks of it")


def _columns_wanted(stored: int, columns: int, sharding: Sharding) -> list[int]:
    """Of columns in use, counted from the oldest, those that fall to a rank."""
    h = min(columns, sharding.depth)
    slots = [(stored - 1 - h + i) % sharding.depth for i in range(h)]
    return [columns - h + i for i, slot in enumerate(slots) if slot in sharding.slots]


def _products(columns: dict[str, Any], held: list[int], fresh: list[int]) -> Tensor:
    """R_held^T R_fresh [held, fresh] float64, where the columns were not held whole before."""
    products = torch.zeros((len(held), len(fresh)), dtype=torch.float64, device="cpu")
    for k, new in enumerate(fresh):
        column = columns["r"][new]
        for row, place in enumerate(held):
            other = columns["r"][place]
            for rows in chunks(column):
                products[row, k] += torch.dot(other[rows].double(), column[rows].double())
    return products


def fingerprint_of(part: History) -> int:
    """A number in [1, 2^36) that parts of one moment have in common, and others do not."""
    same = plain(part["replicated"], "part")  # NumPy's numbers read otherwise than Python's
    digest = hashlib.sha256(repr(_ordered(same)).encode()).digest()
    return 1 + int.from_bytes(digest[:8], "big") % (2**36 - 1)


def _ordered(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [(key, _ordered(value[key])) for key in sorted(value)]
    if isinstance(value, list | tuple):
        return [_ordered(x) for x in value]
    return value.tolist() if isinstance(value, Tensor) else value


# Between ranks


def consolidate(
    comm: Communicator, make_part: Callable[[], History], to: int, needed: bool
) -> History | None:
    """The whole history on rank `to`, None on the others. Collective.

    One rank's part at a time is made, sent and forgotten: beside it a rank other than `to` needs
    no memory.

    Args:
        comm: the ranks that train together.
        make_part: makes this rank's part.
        to: a rank of `comm`.
        needed: whether this rank's rows are: those of one group of ranks are the whole.

    Raises:
        CheckpointError: on every rank, if a part could not be made or put in its place.
    """
    if comm.size == 1:
        return make_part()
    whole, problem, complete = _Whole(), "", True
    for source in range(comm.size):
        header: Tensor | None = None
        tensors: list[Tensor] = []
        if comm.rank == source:
            try:
                part = make_part()
                rest, tensors = take_apart(part if needed else {"own": part["own"]})
                header = bytes_of(rest)
            except Exception as error:  # the others are in step with this rank: it must go on
                problem = f"{type(error).__name__}: {error}"
                header = torch.zeros(0, dtype=torch.uint8, device="cpu")
        header = comm.deliver(header, source, to)
        count = int(comm.allreduce(np.array([len(tensors)], dtype=np.float64), "max")[0])
        received = []
        for i in range(count):
            own = tensors[i].reshape(-1).view(torch.uint8) if comm.rank == source else None
            received.append(comm.deliver(own, source, to))
        complete = complete and (header is None or len(header) > 0)
        if header is not None and complete and not problem:
            try:
                whole.add(put_together(from_bytes(header), received))
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
        part = {}
        del tensors, received
    history = None
    if comm.rank == to and complete and not problem:
        try:
            history = whole.finished()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
    problems = comm.allgather_object(problem)
    for rank, text in enumerate(problems):
        if text:
            raise CheckpointError(f"Rank {rank} could not consolidate the history: {text}")
    return history


@dataclasses.dataclass(frozen=True)
class _Held:
    """What a rank can say of a part it holds, without handing it out."""

    fingerprint: str
    at: int  # of the rank that holds it: rank and place among its parts
    place: int
    rows: tuple[int, int]
    index: frozenset[int]
    stored: int
    columns: int
    size: int  # of whom the part was
    rank: int


# Pieces of parts: from which part, for which rank, rows, columns.
_Piece = tuple[_Held, int, tuple[int, int], frozenset[int]]
_ROWS = -1  # stands for what a part holds beside columns


def redistribute(
    comm: Communicator, parts: Sequence[History], sharding: Sharding
) -> tuple[History | None, str]:
    """Each rank's part of a history from what the ranks hold of it under any sharding. Collective.

    Pieces travel through host memory, straight to the rank that needs them: it needs memory for
    its own part, and a rank that holds parts as much again as it holds.

    Args:
        comm: the ranks that go on together.
        parts: what this rank holds, of itself or of others. The first of rank 0 says which history
            it is: parts of other moments are of no use.
        sharding: which rows and columns this rank needs.

    Returns:
        A part that `load_state_dict` takes on this rank, and "". Or, on every rank, None, and why:
        "" if nothing is stored.
    """
    held = [
        _Held(
            fingerprint=f"{fingerprint_of(part)} {sorted(part['rows'])} {sorted(part['undo'])}",
            at=comm.rank,
            place=place,
            rows=(part["sharding"]["rows"][0], part["sharding"]["rows"][1]),
            index=frozenset(part["columns"]["index"]),
            stored=part["replicated"]["stored"],
            columns=part["replicated"]["columns"],
            size=part["sharding"]["size"],
            rank=part["sharding"]["rank"],
        )
        for place, part in enumerate(parts)
    ]
    everybody = comm.allgather_object((held, sharding))
    said = [part for parts_there, _ in everybody for part in parts_there]
    first = next(iter(everybody[0][0]), None)
    if first is None or not first.stored:
        return None, ""
    known = [part for part in said if part.fingerprint == first.fingerprint]
    plan = _plan(known, [wanted for _, wanted in everybody])
    if plan is None:
        gone = sorted(set(range(first.size)) - {part.rank for part in known})
        other = any(part.stored and part.fingerprint != first.fingerprint for part in said)
        return None, (
            f"the part of {_named(gone)} of {first.size} that shared it is lost"
            + (", or of another moment" if other else "")
        )

    problem = ""
    outgoing: dict[int, list[History]] = {}
    pieces: list[History] = []
    packed: dict[int, Tensor] = {}
    try:
        for part, to, rows, index in plan:
            if part.at == comm.rank:
                outgoing.setdefault(to, []).append(_cut(parts[part.place], rows, index))
        pieces = outgoing.pop(comm.rank, [])
        packed = {to: bytes_of(sent) for to, sent in outgoing.items()}
    except Exception as error:  # the others are in step with this rank: it must go on
        problem = f"{type(error).__name__}: {error}"
    del outgoing
    incoming = comm.exchange(packed)
    history = None
    try:
        for data in incoming.values():
            pieces += from_bytes(data)
        whole = _Whole(sharding.rows, _columns_wanted(first.stored, first.columns, sharding))
        for piece in pieces:
            whole.add(piece)
        history = whole.finished()
    except Exception as error:
        problem = problem or f"{type(error).__name__}: {error}"
    for rank, text in enumerate(comm.allgather_object(problem)):
        if text:
            return None, f"rank {rank} could not hand out or take in a part: {text}"
    return history, ""


def _plan(known: Sequence[_Held], wanted: Sequence[Sharding]) -> list[_Piece] | None:
    """Which pieces go where, the same on every rank; None if nobody has some of them.

    A rank takes what it has itself, and the rest from those that come after it, so that several
    that hold the same each hand out some of it.
    """
    plan: list[_Piece] = []
    for to, sharding in enumerate(wanted):
        columns = _columns_wanted(known[0].stored, known[0].columns, sharding)
        gaps = [(*sharding.rows, frozenset([_ROWS, *columns]))]
        turned = [p for p in known if p.at >= to] + [p for p in known if p.at < to]
        if sharding.rows[0] == sharding.rows[1]:  # more ranks than rows
            plan.append((turned[0], to, sharding.rows, gaps.pop()[2]))
        for part in turned:
            if not gaps:
                break
            left = []
            for lo, hi, index in gaps:
                first, last = max(lo, part.rows[0]), min(hi, part.rows[1])
                found = index & (part.index | {_ROWS})
                if first >= last or not found:
                    left.append((lo, hi, index))
                    continue
                plan.append((part, to, (first, last), found))
                rest = (lo, first, index), (last, hi, index), (first, last, index - found)
                left += [gap for gap in rest if gap[0] < gap[1] and gap[2]]
            gaps = left
        if gaps:
            return None
    return plan


def _cut(part: History, rows: tuple[int, int], index: frozenset[int]) -> History:
    """Some rows and columns of a part; shares its memory where it can."""
    columns, (first, last) = part["columns"], part["sharding"]["rows"]
    cut = slice(max(rows[0] - first, 0), max(min(rows[1], last) - first, 0))
    held = [place for place, i in enumerate(columns["index"]) if i in index]
    picked = {
        name: columns[name][held] for name in ("weights", "products") if columns[name] is not None
    }
    return part | {
        "sharding": part["sharding"] | {"rows": [*rows]},
        "rows": {name: tensor[..., cut].clone() for name, tensor in part["rows"].items()},
        "columns": {"products": None}
        | picked
        | {
            "index": [columns["index"][place] for place in held],
            "y": columns["y"][held, cut],
            "r": columns["r"][held, cut],
        },
        "own": {},
    }


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def bytes_of(value: Any) -> Tensor:
    """Nested containers of what `save` takes, as [k] uint8."""
    buffer = io.BytesIO()
    torch.save(plain(value, "part"), buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def from_bytes(data: Tensor) -> Any:
    """What `bytes_of` was given."""
    return torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)


def take_apart(value: Any) -> tuple[Any, list[Tensor]]:
    """Nested containers with places in place of large tensors, and these."""
    large: list[Tensor] = []

    def without(value: Any) -> Any:
        if type(value) is dict:
            return {key: without(entry) for key, entry in value.items()}
        if type(value) in (list, tuple):  # others, such as namedtuple, are made in other ways
            return type(value)(map(without, value))
        if isinstance(value, Tensor) and value.numel() * value.element_size() >= _LARGE:
            large.append(value.contiguous())
            name = str(value.dtype).removeprefix("torch.")
            return {_ELSEWHERE: len(large) - 1, "dtype": name, "shape": list(value.shape)}
        return value

    return without(value), large


def put_together(value: Any, received: Sequence[Tensor | None]) -> Any:
    """What `take_apart` was given, of the bytes [k] uint8 of its large tensors."""
    if type(value) is dict and _ELSEWHERE in value:
        data = received[value[_ELSEWHERE]]
        assert data is not None
        return data.view(getattr(torch, value["dtype"])).reshape(value["shape"])
    if type(value) is dict:
        return {key: put_together(entry, received) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(put_together(entry, received) for entry in value)
    return value


# Into an optimizer


def examined(
    anderson: Any,
    parameters: list[list[Any]],
    config: Mapping[str, Any],
    sharding: Sharding,
    ranks: int,
    rank: int,
) -> tuple[History | None, str]:
    """What of a state_dict's entry "anderson" a rank can go on from; changes nothing.

    Args:
        anderson: the entry.
        parameters: `described` of the optimizer that loads it.
        config: `AndersonConfig.to_dict()` of that optimizer.
        sharding: which rows and columns this rank needs.
        ranks: how many ranks train together.
        rank: this one among them.

    Returns:
        The part to go on from, or None and why there is none, "" where none was saved.

    Raises:
        CheckpointError: damaged, from a newer version, or of another model: says what differs.
    """
    what = "state_dict['anderson']"
    with readable(what):
        entries({"format": anything})(anderson, what)
        _check_format(f"{what}['format']", anderson["format"], FORMAT)
        _ENTRY(anderson, what)
        rehearsal = Stats()
        rehearsal.load_counters(anderson["counters"])
        rehearsal.load_measured(anderson.get("measured", {}))
        history = anderson.get("history")
        if "parameters" in anderson:
            _compare(anderson["parameters"], parameters, dtypes=history is not None)
        if history is None:
            return None, ""
        _WITH_HISTORY(anderson, what)
        if not config["enabled"]:
            return None, "enabled=False keeps none" if history["replicated"]["stored"] else ""
        before = anderson["config"]
        if before["residual"] != config["residual"]:
            return None, f"residual={config['residual']!r}, and was {before['residual']!r}"
        if [p[2] for p in anderson["parameters"]] != [p[2] for p in parameters]:
            return None, "other parameters are trained (requires_grad)"
        part = _fitted(_in_host_memory(history), sharding, ranks, rank)
        if any(before[name] != config[name] for name in _TRIED_WITH):
            part["undo"], part["own"] = {}, {}
            part["rows"].pop("base", None)
            part["replicated"]["losses"]["verdict_due"] = False
        return part, ""


# What decides how and when a step is judged after the fact.
_TRIED_WITH = "frequency", "store_every", "warmup_steps", "safeguard"


def described(optimizer: torch.optim.Optimizer) -> list[list[Any]]:
    """[shape, dtype, requires_grad] of all parameters of an optimizer, in plain types."""
    return [
        [list(p.shape), str(p.dtype).removeprefix("torch."), p.requires_grad]
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def _compare(saved: list[list[Any]], here: list[list[Any]], dtypes: bool) -> None:
    if len(saved) != len(here):
        raise CheckpointError(
            f"Invalid state_dict of an optimizer with {len(saved)} parameters. Must have "
            f"{len(here)}, as this one."
        )
    different = []
    for i, ((shape, dtype, _), (own_shape, own_dtype, _)) in enumerate(
        zip(saved, here, strict=True)
    ):
        if shape != own_shape:
            different.append(f"parameter {i} had shape {tuple(shape)}, has {tuple(own_shape)}")
        if dtypes and dtype != own_dtype:
            different.append(f"parameter {i} was {dtype}, is {own_dtype}")
    if different:
        more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
        raise CheckpointError(
            f"Invalid state_dict of another model: {'; '.join(different[:5])}{more}."
        )


def _in_host_memory(value: Any) -> Any:
    """What torch.load may have put on a GPU; what is in host memory is not copied."""
    if isinstance(value, dict):
        return {key: _in_host_memory(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_in_host_memory, value))
    return value.cpu() if isinstance(value, Tensor) else value


def _check_format(what: str, found: Any, newest: int) -> None:
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= newest:
        raise CheckpointError(
            f"Invalid {what}={found!r}. Must be at most {newest}: it was written by another "
            "version of aadl_hvd."
        )


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """What is not as it should be trips those who read it in many ways: a CheckpointError here."""
    try:
        yield
    except (AndersonError, torch.cuda.OutOfMemoryError):
        raise
    except _TRIPPED as error:
        raise CheckpointError(
            f"Invalid {what}: damaged, or not of aadl_hvd ({type(error).__name__}: {error})."
        ) from error


_TRIPPED = (
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError),
    RuntimeError,  # NotImplementedError among them
)
