"""Ranks of a Horovod process set."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pickle
import platform
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.torch.mpi_ops import is_homogeneous
from torch import Tensor

from aadl_hvd.comm.base import ADVICE, Communicator, ShardGroup, Values
from aadl_hvd.comm.local import LocalCommunicator
from aadl_hvd.comm.mpi import MpiCommunicator
from aadl_hvd.errors import CommunicationError, ConfigError

_instances = itertools.count()

NAP = 1e-5
"""Seconds between two looks whether Horovod is done on Gloo. Its own wait is a loop of sched_yield:
where ranks share cores, as on a laptop, it takes them from the threads that it waits for. MPI waits
in such a loop itself, and there waking up takes longer than it saves."""


class HorovodCommunicator(Communicator):
    """Large tensors through Horovod, tiny reductions through `host` where there is one.

    Making one is collective over the process set.

    Args:
        process_set: a Horovod process set that includes this rank.
        host: a communicator of the same ranks in the same order for small vectors; None: they go
            through Horovod too, which costs about a millisecond of negotiation each.
    """

    def __init__(self, process_set: Any, host: MpiCommunicator | None = None) -> None:
        self._set = process_set
        self.rank = process_set.rank()
        self.size = process_set.size()
        self.host = host
        # A name that is new, and the same on every rank: those that were outside other process
        # sets, or joined later, have built fewer of these.
        built = torch.tensor([next(_instances)], device="cpu")
        newest = hvd.allreduce(built, op=hvd.Max, name="aadl_hvd.name", process_set=process_set)
        self._name = f"aadl_hvd.{int(newest)}"

    @property
    def _process_set(self) -> Any:
        # Horovod's own elastic state does not call sync() where hosts were only removed.
        if self._set.size() != self.size:
            raise HorovodInternalError(
                f"Horovod was initialised anew: {self._set.size()} ranks, and {self.size} before. "
                "Call sync() of the elastic state; aadl_hvd.elastic.TorchState does."
            )
        return self._set

    def poll_until(self, done: Callable[[], bool]) -> None:
        if self.host is not None:
            return self.host.poll_until(done)
        while not done():
            time.sleep(NAP)
        return None

    def explain(self, error: Exception) -> None:
        if self.host is not None:
            self.host.explain(error)
        error.add_note("If another rank has left or was killed: what it says itself tells why.")

    def allgather_object(self, item: Any) -> list[Any]:
        # hvd.allgather_object knows no process sets.
        data = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8)
        size = torch.tensor([data.numel()], device="cpu")
        name, process_set = f"{self._name}.object", self._process_set
        sizes = hvd.allgather(size, name=f"{name}.size", process_set=process_set)
        joined = hvd.allgather(data, name=name, process_set=process_set)
        return [pickle.loads(part.numpy().tobytes()) for part in joined.split(sizes.tolist())]

    def _allreduce_sum(self, values: Values) -> Values:
        if self.host is not None:
            return self.host._allreduce_sum(values)  # they are checked
        return self._reduce(values, hvd.Sum)

    def _allreduce_max(self, values: Values) -> Values:
        if self.host is not None:
            return self.host._allreduce_max(values)
        return self._reduce(values, hvd.Max)

    def _broadcast(self, values: Values) -> Values:
        if self.host is not None:
            return self.host._broadcast(values)
        return self._reduce(values if self.rank == 0 else np.zeros_like(values), hvd.Sum)

    def _reduce(self, values: Values, op: Any) -> Values:
        # One name and one kind for all: ranks that are in different operations are told so by
        # Horovod, which to names of its own for each would answer by waiting.
        with self._explained():
            handle = hvd.allreduce_async(
                torch.from_numpy(values),
                op=op,
                name=f"{self._name}.small",
                process_set=self._process_set,
            )
            return np.asarray(_finished(handle))

    def gather_by_pieces(self, block: Tensor) -> Generator[tuple[int, Tensor], None, None]:
        if self.host is not None and self.host.on_one_node and block.device.type == "cpu":
            return self.host.gather_by_pieces(block)
        return super().gather_by_pieces(block)

    def _allgather(self, block: Tensor) -> Tensor:
        with self._explained():
            handle = hvd.allgather_async(
                block, name=f"{self._name}.allgather", process_set=self._process_set
            )
            return _finished(handle)

    def _send(
        self, data: Tensor | None, out: Tensor | None, length: int, source: int, to: int
    ) -> None:
        if self.host is not None:
            return self.host._send(data, out, length, source, to)
        splits = torch.zeros(self.size, dtype=torch.int32, device="cpu")
        if data is not None:
            splits[to] = length
        received, _ = hvd.alltoall(
            torch.empty(0, dtype=torch.uint8, device="cpu") if data is None else data,
            splits,
            name=f"{self._name}.send",
            process_set=self._process_set,
        )
        if out is not None:
            out.copy_(received)
        return None

    def _alltoall(self, data: list[Tensor]) -> list[Tensor]:
        joined, lengths = hvd.alltoall(
            torch.cat(data),
            torch.tensor([len(part) for part in data], dtype=torch.int32, device="cpu"),
            name=f"{self._name}.alltoall",
            process_set=self._process_set,
        )
        return list(joined.split(lengths.tolist()))

    def _sum_tensor(self, tensor: Tensor) -> Tensor:
        with self._explained():
            handle = hvd.allreduce_async_(
                tensor, op=hvd.Sum, name=f"{self._name}.sum", process_set=self._process_set
            )
            return _finished(handle)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except HorovodInternalError as error:
            if "Mismatched" in str(error):
                raise CommunicationError(
                    f"Ranks are in different operations: {error}. {ADVICE}"
                ) from None
            self.explain(error)
            raise  # as it is: Horovod elastic waits for it


def _finished(handle: Any) -> Tensor:
    """The result of one of Horovod's collectives; its errors are raised here."""
    while not hvd.mpi_enabled() and not hvd.poll(handle):
        time.sleep(NAP)
    return hvd.synchronize(handle)  # type: ignore[no-any-return]


def horovod_communicator(process_set: Any) -> Communicator:
    """The communicator of a process set. Collective over its ranks.

    A rank that is not in the set trains by itself, as with Horovod, and gets a group of one.
    """
    if not process_set.included() or process_set.size() == 1:
        return LocalCommunicator()
    through_horovod = HorovodCommunicator(process_set)
    return HorovodCommunicator(process_set, _mpi_communicator(process_set, through_horovod))


def _mpi_communicator(process_set: Any, agree: Communicator) -> MpiCommunicator | None:
    """mpi4py's view of the set, if every rank has it and it numbers the ranks as Horovod does."""
    if not (hvd.mpi_enabled() and hvd.mpi_threads_supported()):
        return None
    ranks = process_set.ranks
    ranks = list(range(hvd.size())) if ranks is None else list(ranks)
    ready = MpiCommunicator.world_rank() == hvd.rank()
    if not all(agree.allgather_object(ready)):
        return None
    host = MpiCommunicator(ranks)
    _announce_joins(host)
    return host


_announcing: weakref.WeakSet[MpiCommunicator] = weakref.WeakSet()


def _announce_joins(host: MpiCommunicator) -> None:
    """Has other ranks told when this one calls `hvd.join()`.

    Horovod then answers for it, but only in collectives of its own.
    """
    _announcing.add(host)
    original = hvd.join
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def join(*args: Any, **kwargs: Any) -> Any:
        for communicator in list(_announcing):
            communicator.join()
        return original(*args, **kwargs)

    hvd.join = join


def shard_group(comm: Communicator, process_set: Any, wanted: Any) -> ShardGroup:
    """The ranks that share one history with this one. Collective over `comm`.

    Args:
        comm: `horovod_communicator(process_set)`.
        process_set: the ranks that train together.
        wanted: `AndersonConfig.shard_group`, the same kind of it on all ranks.

    Raises:
        ConfigError: on every rank; they cannot be split in this way.
    """
    if comm.size == 1 or (isinstance(wanted, str) and wanted == "world"):
        return ShardGroup(comm)
    groups = _groups_of_nodes(comm) if wanted == "node" else _groups_of_sets(comm, wanted)
    mine = next(i for i, ranks in enumerate(groups) if hvd.rank() in ranks)
    if len(groups) == 1:
        return ShardGroup(comm)
    if len(groups[mine]) == 1:
        return ShardGroup(LocalCommunicator(), len(groups), mine)
    if wanted == "node":
        wanted = _registered(comm, process_set, groups)[mine]
    return ShardGroup(HorovodCommunicator(wanted), len(groups), mine)


def _groups_of_nodes(comm: Communicator) -> list[list[int]]:
    if not is_homogeneous():
        raise ConfigError(
            "Invalid shard_group='node': the nodes of this job run unequal numbers of ranks. Must "
            "be equal, so that all groups cut the history alike; or shard_group='world'."
        )
    nodes = defaultdict(list)
    for rank, host, cross in comm.allgather_object((hvd.rank(), platform.node(), hvd.cross_rank())):
        nodes[host].append((rank, cross))
    groups = []
    for ranks in nodes.values():
        # Ranks of one local rank are numbered across nodes in their own order, which need not be
        # that of another local rank; it tells nodes apart where several have one name.
        named = defaultdict(list)
        for rank, cross in ranks:
            named[cross if len(ranks) > hvd.local_size() else None].append(rank)
        groups += list(named.values())
    groups.sort()
    _check_sizes("'node'", groups)
    return groups


def _groups_of_sets(comm: Communicator, wanted: Any) -> list[list[int]]:
    known = wanted.process_set_id is not None
    said = comm.allgather_object((hvd.rank(), list(wanted.ranks) if known else None))
    for rank, ranks in said:
        if ranks is None or rank not in ranks:
            raise ConfigError(
                f"Invalid shard_group on rank {rank}: its process set "
                + ("is not registered" if ranks is None else f"of ranks {ranks} leaves it out")
                + ". Must include it, and be given to hvd.init or hvd.add_process_set first."
            )
    groups = sorted({tuple(ranks) for _, ranks in said})
    if sorted(rank for ranks in groups for rank in ranks) != sorted(rank for rank, _ in said):
        raise ConfigError(
            f"Invalid shard_group: process sets of ranks {[list(ranks) for ranks in groups]}. Must "
            "split the ranks that train together, each in one of them."
        )
    _check_sizes("process set", groups)
    return [list(ranks) for ranks in groups]


def _check_sizes(wanted: str, groups: Any) -> None:
    sizes = sorted({len(ranks) for ranks in groups})
    if len(sizes) > 1:
        raise ConfigError(
            f"Invalid shard_group={wanted}: groups of {sizes} ranks. Must be of one size, so that "
            "all groups cut the history alike."
        )


def _registered(comm: Communicator, process_set: Any, groups: list[list[int]]) -> list[Any]:
    """Horovod's process sets of these ranks, made where there are none."""
    from horovod.common import process_sets

    # The only way to sets that are there already; the same on every rank.
    table = process_sets._basics._get_process_set_ids_and_ranks()
    known = {tuple(ranks): number for number, ranks in table.items()}
    missing = [ranks for ranks in groups if tuple(ranks) not in known]
    dynamic = os.environ.get("HOROVOD_DYNAMIC_PROCESS_SETS", "0") not in ("", "0")
    if missing and not (all(comm.allgather_object(dynamic)) and comm.size == hvd.size()):
        raise ConfigError(
            f"Invalid shard_group='node': Horovod has no process sets of the ranks {missing}. "
            "Set HOROVOD_DYNAMIC_PROCESS_SETS=1 in the environment of all ranks (not for an "
            "optimizer on a process set), or give the sets to hvd.init."
        )
    found = []
    for ranks in groups:
        if tuple(ranks) in known:
            known_set = hvd.ProcessSet(ranks)
            known_set.process_set_id = known[tuple(ranks)]
            found.append(known_set)
        else:
            found.append(hvd.add_process_set(ranks))
    return found
