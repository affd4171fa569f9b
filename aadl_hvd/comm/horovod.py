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

from aadl_hvd.comm.base import (
    ADVICE,
    Communicator,
    Gathering,
    ShardGroup,
    Values,
    checked_tensor,
)
from aadl_hvd.comm.hosts import Hosts
from aadl_hvd.comm.local import LocalCommunicator
from aadl_hvd.comm.messages import KINDS
from aadl_hvd.comm.mpi import MpiCommunicator
from aadl_hvd.errors import CommunicationError, ConfigError

_instances = itertools.count()

LENGTH = 1024  # of small vectors, or a multiple of it: all that a step of ResNet50 sends fits

NAP = 1e-5
"""Seconds between two polls of Horovod on Gloo. Horovod itself waits in a loop of sched_yield. If
ranks share cores, as on a laptop, that loop takes the cores from the threads that it waits for. On
MPI it does not pay: MPI waits in such a loop itself, and waking up takes longer than it saves."""


class HorovodCommunicator(Communicator):
    """Large tensors go through Horovod, small vectors and bytes through `host`, if there is one.

    The constructor is collective over the process set.

    Args:
        process_set: a Horovod process set that includes this rank.
        host: a communicator of the same ranks in the same order. None: small vectors go through
            Horovod too, which takes about a millisecond each, because its ranks agree first.
    """

    def __init__(self, process_set: Any, host: MpiCommunicator | None = None) -> None:
        self._set = process_set
        self.rank = process_set.rank()
        self.size = process_set.size()
        self.host = host
        # The name must be new, and the same on every rank. Ranks that are outside of other process
        # sets, or that came later, have built fewer communicators. So all take the largest count.
        built = torch.tensor([next(_instances)], device="cpu")
        newest = hvd.allreduce(built, op=hvd.Max, name="aadl_hvd.name", process_set=process_set)
        self._name = f"aadl_hvd.{int(newest)}"
        self.hosts = Hosts(self.allgather_object) if host is None else host.hosts
        self._later: Gathering | None = None  # started last, not waited for yet

    @property
    def _process_set(self) -> Any:
        # Horovod's own elastic state does not call sync() if hosts have only been removed.
        if self._set.size() != self.size:
            raise HorovodInternalError(
                f"Horovod was initialized again: with {self._set.size()} ranks, after {self.size} "
                "before. Call sync() of the elastic state. aadl_hvd.elastic.TorchState does so."
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
        self.hosts.explain(error)
        error.add_note("If another rank has left or was killed, its own output says why.")

    # The host's public methods check the arguments, so they are not checked twice.

    def allreduce(self, values: Values, op: str = "sum") -> Values:
        if self.host is not None:
            return self.host.allreduce(values, op)
        return super().allreduce(values, op)

    def broadcast(self, values: Values) -> Values:
        if self.host is not None:
            return self.host.broadcast(values)
        return super().broadcast(values)

    def send(self, data: Tensor | None, source: int, to: int) -> Tensor | None:
        if self.host is not None:
            return self.host.send(data, source, to)
        return super().send(data, source, to)

    def allgather_object(self, item: Any) -> list[Any]:
        # hvd.allgather_object does not take a process set.
        data = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8)
        size = torch.tensor([data.numel()], device="cpu")
        name, process_set = f"{self._name}.object", self._process_set
        sizes = hvd.allgather(size, name=f"{name}.size", process_set=process_set)
        joined = hvd.allgather(data, name=name, process_set=process_set)
        return [pickle.loads(part.numpy().tobytes()) for part in joined.split(sizes.tolist())]

    def _allreduce_sum(self, values: Values) -> Values:
        return self._sum(values, "sum")

    def _allreduce_max(self, values: Values) -> Values:
        # Horovod's own maximum would be another kind of collective, see `_sum`.
        own = np.zeros((self.size, len(values)))
        own[self.rank] = values
        return np.asarray(self._sum(own.ravel(), "maximum").reshape(own.shape).max(axis=0))

    def _broadcast(self, values: Values) -> Values:
        return self._sum(values if self.rank == 0 else np.zeros_like(values), "broadcast")

    def _sum(self, values: Values, kind: str) -> Values:
        # Horovod keeps by name what its ranks have agreed on. Where shape or kind changes, they
        # agree anew, in five more collectives. So all small vectors are sums of one length. If each
        # had a name of its own, Horovod would wait for ever for ranks in different operations. Here
        # the last three sums tell them.
        k = len(values)
        operation = float(k % LENGTH * len(KINDS) + KINDS.index(kind))
        message = np.zeros(-(-(k + 3) // LENGTH) * LENGTH)
        message[:k] = values
        message[-3:] = 1.0, operation, operation**2
        with self._explained():
            handle = hvd.allreduce_async(
                torch.from_numpy(message),
                op=hvd.Sum,
                name=f"{self._name}.small",
                process_set=self._process_set,
            )
            sums = np.asarray(_finished(handle))
        ranks, operations, squares = sums[-3:]
        if ranks != self.size:  # Horovod adds zeros for a rank that has joined
            raise CommunicationError(
                "Another rank has called hvd.join(), and this one waits for it in a step. "
                "Acceleration needs every rank in every step. Give all ranks equally many batches."
            )
        if operations**2 != ranks * squares:  # their variance: integers, so it is exact
            said = self.allgather_object(f"is in a {kind} and sends {k} numbers")
            found = "; ".join(f"rank {said.index(what)} {what}" for what in dict.fromkeys(said))
            raise CommunicationError(f"Ranks are in different operations: {found}. {ADVICE}")
        return sums[:k]

    def gather_by_pieces(self, block: Tensor) -> Generator[tuple[int, Tensor], None, None]:
        if self.host is not None and self.host.on_one_node and block.device.type == "cpu":
            return self.host.gather_by_pieces(block)
        return super().gather_by_pieces(block)

    def gather_later(self, block: Tensor) -> Gathering:
        if self.host is not None and self.host.on_one_node and block.device.type == "cpu":
            return self.host.gather_later(block)
        block = checked_tensor(block)
        if self._later is not None:  # nobody wanted it, and Horovod allows one of a name at a time
            self._later.wait()
        with self._explained():
            handle = hvd.allgather_async(
                block, name=f"{self._name}.later", process_set=self._process_set
            )

        def finish() -> Tensor:
            self._later = None
            with self._explained():
                return _finished(handle).view(self.size, -1)

        self._later = Gathering(finish)
        return self._later

    def _allgather(self, block: Tensor) -> Tensor:
        with self._explained():
            handle = hvd.allgather_async(
                block, name=f"{self._name}.allgather", process_set=self._process_set
            )
            return _finished(handle)

    def _send(
        self, data: Tensor | None, out: Tensor | None, length: int, source: int, to: int
    ) -> None:
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
    """Waits for a collective of Horovod and returns its result. Raises its errors."""
    while not hvd.mpi_enabled() and not hvd.poll(handle):
        time.sleep(NAP)
    return hvd.synchronize(handle)  # type: ignore[no-any-return]


def horovod_communicator(process_set: Any) -> Communicator:
    """The communicator of a process set. Collective over its ranks.

    A rank outside of the set trains by itself, as with Horovod. It gets a group of one rank.
    """
    if not process_set.included() or process_set.size() == 1:
        return LocalCommunicator()
    through_horovod = HorovodCommunicator(process_set)
    return HorovodCommunicator(process_set, _mpi_communicator(process_set, through_horovod))


def _mpi_communicator(process_set: Any, agree: HorovodCommunicator) -> MpiCommunicator | None:
    """The same ranks through mpi4py. None if mpi4py is unavailable or numbers ranks differently.

    Args:
        process_set: the ranks.
        agree: a communicator of these ranks, through which they agree on the answer.
    """
    if not (hvd.mpi_enabled() and hvd.mpi_threads_supported()):
        return None
    ranks = process_set.ranks
    ranks = list(range(hvd.size())) if ranks is None else list(ranks)
    ready = MpiCommunicator.world_rank() == hvd.rank()
    if not all(agree.allgather_object(ready)):
        return None
    host = MpiCommunicator(ranks, agree.hosts)
    _announce_joins(host)
    return host


_announcing: weakref.WeakSet[MpiCommunicator] = weakref.WeakSet()


def _announce_joins(host: MpiCommunicator) -> None:
    """Wraps `hvd.join`, so that other ranks are told when this rank calls it.

    Horovod then takes part for this rank in its own collectives, but not in those of `host`.
    """
    _announcing.add(host)
    original = hvd.join
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def join(*args: Any, **kwargs: Any) -> Any:
        for communicator in list(_announcing):
            communicator.announce_join()
        return original(*args, **kwargs)

    hvd.join = join


def shard_group(comm: Communicator, process_set: Any, wanted: Any) -> ShardGroup:
    """The ranks that share one history with this rank. Collective over `comm`.

    Args:
        comm: `horovod_communicator(process_set)`.
        process_set: the ranks that train together.
        wanted: `AndersonConfig.shard_group`, of the same kind on all ranks.

    Raises:
        ConfigError: on every rank, if the ranks cannot be split in this way.
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
            "Invalid shard_group='node': the nodes of this job run different numbers of ranks. All "
            "nodes must run the same number, so that all groups divide the history in the same "
            "way. Otherwise use shard_group='world'."
        )
    nodes = defaultdict(list)
    for rank, host, cross in comm.allgather_object((hvd.rank(), platform.node(), hvd.cross_rank())):
        nodes[host].append((rank, cross))
    groups = []
    for ranks in nodes.values():
        # Several nodes may have the same name: then cross ranks tell them apart. Horovod numbers
        # cross ranks for each local rank separately, so they need not have the same order.
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
                + ". Must include this rank. Give the set to hvd.init or hvd.add_process_set first."
            )
    groups = sorted({tuple(ranks) for _, ranks in said})
    if sorted(rank for ranks in groups for rank in ranks) != sorted(rank for rank, _ in said):
        raise ConfigError(
            f"Invalid shard_group: process sets of ranks {[list(ranks) for ranks in groups]}. Each "
            "of the ranks that train together must be in exactly one of them."
        )
    _check_sizes("process set", groups)
    return [list(ranks) for ranks in groups]


def _check_sizes(wanted: str, groups: Any) -> None:
    sizes = sorted({len(ranks) for ranks in groups})
    if len(sizes) > 1:
        raise ConfigError(
            f"Invalid shard_group={wanted}: groups of {sizes} ranks. All groups must have the same "
            "size, so that they divide the history in the same way."
        )


def _registered(comm: Communicator, process_set: Any, groups: list[list[int]]) -> list[Any]:
    """Horovod's process sets of these ranks. Those that do not exist are added."""
    from horovod.common import process_sets

    # Horovod has no public way to find existing sets. The answer is the same on every rank.
    table = process_sets._basics._get_process_set_ids_and_ranks()
    known = {tuple(ranks): number for number, ranks in table.items()}
    missing = [ranks for ranks in groups if tuple(ranks) not in known]
    dynamic = os.environ.get("HOROVOD_DYNAMIC_PROCESS_SETS", "0") not in ("", "0")
    if missing and not (all(comm.allgather_object(dynamic)) and comm.size == hvd.size()):
        raise ConfigError(
            f"Invalid shard_group='node': Horovod has no process sets of the ranks {missing}. "
            "Set HOROVOD_DYNAMIC_PROCESS_SETS=1 in the environment of all ranks. If the optimizer "
            "is on a process set, give the sets to hvd.init instead."
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
