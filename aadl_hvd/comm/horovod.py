"""Ranks of a Horovod process set."""

from __future__ import annotations

import contextlib
import functools
import itertools
import pickle
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor

from aadl_hvd.comm.base import (
    ADVICE,
    Communicator,
    Gathering,
    Values,
    checked_tensor,
)
from aadl_hvd.comm.hosts import Hosts
from aadl_hvd.comm.local import LocalCommunicator
from aadl_hvd.comm.messages import KINDS
from aadl_hvd.comm.mpi import MpiCommunicator
from aadl_hvd.errors import CommunicationError

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
        world: of a shard group: all ranks that train together. A gathering in the group ends when
            all groups have begun theirs. Otherwise ranks that gather in their last step may exit
            while another group still gathers. Horovod then ends that one's gathering with an error.
    """

    def __init__(
        self,
        process_set: Any,
        host: MpiCommunicator | None = None,
        world: HorovodCommunicator | None = None,
    ) -> None:
        self._set = process_set
        self._world = world
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
        started = self._start_gathering(block, "later")

        def finish() -> Tensor:
            self._later = None
            return self._gathered(*started).view(self.size, -1)

        self._later = Gathering(finish)
        return self._later

    def _allgather(self, block: Tensor) -> Tensor:
        return self._gathered(*self._start_gathering(block, "allgather"))

    def _start_gathering(self, block: Tensor, name: str) -> list[Any]:
        """Horovod's handles: of the gathering, and of the sum that says that all have begun it.

        In a cycle Horovod looks at the sets one by one, at that of all ranks first. If it finds the
        sum complete in one cycle, all ranks' gatherings are complete when that cycle ends. Only a
        later cycle can end Horovod.
        """
        with self._explained():
            handles = [
                hvd.allgather_async(
                    block, name=f"{self._name}.{name}", process_set=self._process_set
                )
            ]
            if self._world is not None:
                handles.append(self._world.say_begun(name))
        return handles

    def say_begun(self, name: str) -> Any:
        """Starts a sum that ends when all ranks have started it; Horovod's handle."""
        return hvd.allreduce_async(
            torch.zeros(1, device="cpu"),
            op=hvd.Sum,
            name=f"{self._name}.begun.{name}",
            process_set=self._process_set,
        )

    def _gathered(self, gathering: Any, *begun: Any) -> Tensor:
        with self._explained():
            blocks = _finished(gathering)
            for handle in begun:
                _finished(handle)
        return blocks

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
