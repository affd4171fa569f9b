"""The history between ranks: to one of them in full, or to each the shard that it needs.

Any rank may fail at any time. It says so in the next collective, in step with the others, and the
error, or the reset, comes up on every rank.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadl_hvd.checkpoint.columns import columns_of
from aadl_hvd.checkpoint.plain import plain
from aadl_hvd.checkpoint.reshard import Held, Merger, plan
from aadl_hvd.checkpoint.shard_state import OwnState, ShardState
from aadl_hvd.comm.base import Communicator
from aadl_hvd.core.sharding import Sharding
from aadl_hvd.errors import CheckpointError

_LARGE = 2**16  # bytes from which a tensor travels by itself
_ELSEWHERE = "tensor sent after this"


def consolidate(
    comm: Communicator, make_shard: Callable[[], ShardState], to: int, needed: bool
) -> ShardState | None:
    """The full state on rank `to`, None on the others. Collective.

    One rank's shard at a time is made, sent and forgotten: beside it a rank other than `to` needs
    no memory.

    Args:
        comm: the ranks that train together.
        make_shard: makes this rank's shard.
        to: a rank of `comm`.
        needed: whether this rank's rows are: those of one group of ranks are all.

    Raises:
        CheckpointError: on every rank, if a shard could not be made or put in its place.
    """
    if comm.size == 1:
        return make_shard()
    merger, problem, complete = Merger(), "", True
    for source in range(comm.size):
        header: Tensor | None = None
        tensors: list[Tensor] = []
        if comm.rank == source:
            try:
                sent = make_shard().to_dict()
                rest, tensors = take_apart(sent if needed else {"own": sent["own"]})
                header = bytes_of(rest)
            except Exception as error:  # the others are in step with this rank: it must go on
                problem = f"{type(error).__name__}: {error}"
                header = torch.zeros(0, dtype=torch.uint8, device="cpu")
        header = comm.send(header, source, to)
        count = int(comm.allreduce(np.array([len(tensors)], dtype=np.float64), "max")[0])
        received = []
        for i in range(count):
            own = tensors[i].reshape(-1).view(torch.uint8) if comm.rank == source else None
            received.append(comm.send(own, source, to))
        complete = complete and (header is None or len(header) > 0)
        if header is not None and complete and not problem:
            try:
                _add(merger, put_together(from_bytes(header), received))
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
        sent = {}
        del tensors, received
    full = None
    if comm.rank == to and complete and not problem:
        try:
            full = merger.merged()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
    for rank, text in enumerate(comm.allgather_object(problem)):
        if text:
            raise CheckpointError(f"Rank {rank} could not consolidate the history: {text}")
    return full


def _add(merger: Merger, received: dict[str, Any]) -> None:
    """Adds a shard, or what its rank alone knows, as dicts."""
    if received.keys() != {"own"}:
        return merger.add(ShardState.from_dict(received, "shard"))
    for rank, own in received["own"].items():
        merger.own[rank] = OwnState.from_dict(own, f"shard['own'][{rank!r}]")
    return None


def redistribute(
    comm: Communicator, shards: Sequence[ShardState], sharding: Sharding
) -> tuple[ShardState | None, str]:
    """Each rank's shard from what the ranks hold of a history under any sharding. Collective.

    Pieces travel through host memory, straight to the rank that needs them: it needs memory for
    its own shard, and a rank that holds shards as much again as it holds.

    Args:
        comm: the ranks that go on together.
        shards: what this rank holds, of itself or of others. The first of rank 0 says which history
            it is: shards of other moments are of no use.
        sharding: which rows and columns this rank needs.

    Returns:
        A shard that `load_state_dict` takes on this rank, and "". Or, on every rank, None, and why:
        "" if nothing is stored.
    """
    held = [Held.of(shard, comm.rank, place) for place, shard in enumerate(shards)]
    everybody = comm.allgather_object((held, sharding))
    said = [shard for shards_there, _ in everybody for shard in shards_there]
    first = next(iter(everybody[0][0]), None)
    if first is None or not first.holds:
        return None, ""
    known = [shard for shard in said if shard.fingerprint == first.fingerprint]
    pieces = plan(known, [wanted for _, wanted in everybody])
    if pieces is None:
        gone = sorted(set(range(first.size)) - {shard.rank for shard in known})
        other = any(shard.holds and shard.fingerprint != first.fingerprint for shard in said)
        return None, (
            f"the shard of {_named(gone)} of {first.size} that shared it is lost"
            + (", or of another moment" if other else "")
        )

    problem = ""
    outgoing: dict[int, list[dict[str, Any]]] = {}
    arrived: list[dict[str, Any]] = []
    packed: dict[int, Tensor] = {}
    try:
        for piece in pieces:
            if piece.source.at == comm.rank:
                cut = shards[piece.source.place].cut(piece.rows, piece.index)
                outgoing.setdefault(piece.to, []).append(cut.to_dict())
        arrived = outgoing.pop(comm.rank, [])
        packed = {to: bytes_of(sent) for to, sent in outgoing.items()}
    except Exception as error:  # the others are in step with this rank: it must go on
        problem = f"{type(error).__name__}: {error}"
    del outgoing
    incoming = comm.all_to_all(packed)
    found = None
    try:
        for data in incoming.values():
            arrived += from_bytes(data)
        merger = Merger(sharding.rows, columns_of(first.stored, first.columns, sharding))
        for received in arrived:
            merger.add(ShardState.from_dict(received, "shard"))
        found = merger.merged()
    except Exception as error:
        problem = problem or f"{type(error).__name__}: {error}"
    for rank, text in enumerate(comm.allgather_object(problem)):
        if text:
            return None, f"rank {rank} could not hand out or take in a shard: {text}"
    return found, ""


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def bytes_of(value: Any) -> Tensor:
    """Nested containers of what `save` takes, as [k] uint8."""
    buffer = io.BytesIO()
    torch.save(plain(value, "shard"), buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def from_bytes(data: Tensor) -> Any:
    """What `bytes_of` was given."""
    return torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)


def take_apart(value: Any) -> tuple[Any, list[Tensor]]:
    """Nested containers with numbers in place of large tensors, and these tensors."""
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
    """What `take_apart` was given, from the bytes [k] uint8 of its large tensors."""
    if type(value) is dict and _ELSEWHERE in value:
        data = received[value[_ELSEWHERE]]
        assert data is not None
        return data.view(getattr(torch, value["dtype"])).reshape(value["shape"])
    if type(value) is dict:
        return {key: put_together(entry, received) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(put_together(entry, received) for entry in value)
    return value
