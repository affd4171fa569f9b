"""Ranks of an MPI communicator, through mpi4py, on host memory."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aadl_hvd.comm.base import Communicator, Values, checked_tensor
from aadl_hvd.comm.departures import Departures
from aadl_hvd.comm.hosts import Hosts
from aadl_hvd.comm.messages import Tag
from aadl_hvd.comm.tree import Tree
from aadl_hvd.errors import CommunicationError


class MpiCommunicator(Communicator):
    """All operations of `Communicator` on an mpi4py intra-communicator.

    Where Horovod runs on MPI, this class carries the small reductions. One takes about 4
    microseconds. Through Horovod it takes a millisecond, for the negotiation of its ranks.

    Small vectors travel along a binomial tree (`tree`). A rank that waits in such an operation
    raises `CommunicationError` (`departures`):

    - at once, when the program of another rank has ended by an error, or when the other rank is in
      another operation;
    - after `departures.LATE` seconds, when the program of another rank has ended without an error,
      or when MPI is shut down: a message may still be on its way;
    - after a second, when the other rank waits for the gradients of a later step, or has called
      `hvd.join()`.

    A rank that is merely late is waited for. A warning names it after
    HOROVOD_STALL_CHECK_TIME_SECONDS (60). The wait ends with an error after
    HOROVOD_STALL_SHUTDOWN_TIME_SECONDS, if that is set, as in Horovod's own collectives.

    `gather_by_pieces` of host memory does the same. It uses memory that is kept and takes half the
    time of Horovod's allgather. Each rank receives the rows of all others directly, which suits
    ranks of one node.

    The other operations are collectives of MPI, which wait without these checks. In training,
    Horovod carries them.

    Args:
        ranks: ranks in MPI's world, in the order that they have here. Collective over these
            ranks only. `world_rank` must not be None on any of them.
        hosts: of these ranks. None: they ask each other.

    Attributes:
        hosts: the hosts of the ranks.
        on_one_node: whether all ranks share a node.
        piece: how many numbers `gather_by_pieces` gathers at a time. They are still in the
            processor's cache when they are used.
    """

    piece = 2**20

    def __init__(self, ranks: list[int], hosts: Hosts | None = None) -> None:
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        # A communicator of its own: its messages cannot meet those of the user or of Horovod.
        self._comm = world.Create_group(world.Get_group().Incl(ranks))
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)  # as exceptions
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()
        node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.on_one_node = node.Get_size() == self.size
        node.Free()
        self._tree = Tree(self._comm)
        self.hosts = hosts or Hosts(self.allgather_object)
        self._departures = Departures(self._comm, self._tree.neighbours, self.hosts.place)
        self._pieces: dict[torch.dtype, NDArray[Any]] = {}  # memory for `gather_by_pieces`

    @staticmethod
    def world_rank() -> int | None:
        """The rank of this process in MPI's world. None: MPI cannot be used.

        That is so if mpi4py is not installed, if MPI does not run, or if MPI does not allow calls
        from several threads. mpi4py does not start MPI here: Horovod does.
        """
        try:
            import mpi4py

            mpi4py.rc.initialize = False
            mpi4py.rc.finalize = False
            from mpi4py import MPI
        except (ImportError, RuntimeError):
            return None
        if not MPI.Is_initialized() or MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            return None
        return int(MPI.COMM_WORLD.Get_rank())

    def allgather_object(self, item: Any) -> list[Any]:
        return list(self._comm.allgather(item))

    def poll_until(self, done: Callable[[], bool]) -> None:
        self._departures.poll_until(done, self._tree.header)

    def announce_join(self) -> None:
        """Tells the other ranks that this rank is about to call `hvd.join()`."""
        self._departures.announce_join()

    def explain(self, error: Exception) -> None:
        self._departures.explain(error)

    def _allreduce_sum(self, values: Values) -> Values:
        return self._run("sum", values)

    def _allreduce_max(self, values: Values) -> Values:
        return self._run("maximum", values)

    def _broadcast(self, values: Values) -> Values:
        return self._run("broadcast", values)

    def _run(self, kind: str, values: Values) -> Values:
        """An operation on the tree."""
        departures = self._departures
        departures.busy = True  # as `in_use()`, which takes a microsecond longer
        try:
            if not departures.over:
                return self._tree.run(kind, values, departures.wait)
        finally:
            departures.busy = False
        departures.give_up()

    def gather_by_pieces(self, block: Tensor) -> Generator[tuple[int, Tensor], None, None]:
        block = checked_tensor(block)
        if block.device.type != "cpu":
            yield from super().gather_by_pieces(block)
            return
        numbers, length = block.numpy(), block.numel()
        # Before rows are sent, all ranks are here and in the same operation.
        longest, shortest = self._run("gathering", np.array([1.0, -1.0]) * numbers.nbytes)
        if longest != -shortest:
            raise CommunicationError(
                f"Invalid block of {numbers.nbytes} bytes on rank {self.rank}. Must have the same "
                f"length and dtype on all ranks. Its size is {-shortest:.0f} bytes on one rank and "
                f"{longest:.0f} bytes on another."
            )
        rows = max(1, min(length, self.piece // self.size))
        memory = self._pieces.get(block.dtype)
        if memory is None or memory.size < rows * self.size:  # new memory would double the time
            memory = self._pieces[block.dtype] = np.empty(rows * self.size, numbers.dtype)
        wanted = True
        for first in range(0, length, rows):
            own = numbers[first : first + rows]
            piece = memory[: own.size * self.size].reshape(self.size, own.size)
            self._exchange_rows(own, piece)
            if first + rows >= length:  # no rank leaves before all ranks have everything
                self._run("gathering", np.zeros(2))
            try:
                if wanted:
                    yield first, torch.from_numpy(piece)
            except GeneratorExit:  # this rank goes on sending: the others still want its rows
                wanted = False

    def _exchange_rows(self, own: NDArray[Any], everybodys: NDArray[Any]) -> None:
        """Sends this rank's rows [k] to all ranks, and receives those of all into [size, k]."""
        others = [(self.rank + i) % self.size for i in range(1, self.size)]
        requests: list[tuple[Any, int]] = []
        with self._departures.in_use():
            if not self._departures.over:
                try:
                    for i in reversed(others):
                        requests.append((self._comm.Irecv(everybodys[i], i, Tag.ROWS), i))
                    for i in others:
                        requests.append((self._comm.Isend(own, i, Tag.ROWS), i))
                    everybodys[self.rank] = own
                    for request, rank in requests:
                        self._departures.wait(request.Test, rank, self._tree.header)
                except BaseException:
                    self._departures.keep(requests, own, everybodys)
                    raise
                return
        self._departures.give_up()

    def _allgather(self, block: Tensor) -> Tensor:
        host = block.cpu()
        result = torch.empty(self.size * host.numel(), dtype=host.dtype, device="cpu")
        self._comm.Allgather(host.numpy(), result.numpy())
        return result.to(block.device)

    def _send(
        self, data: Tensor | None, out: Tensor | None, length: int, source: int, to: int
    ) -> None:
        if data is not None:
            self._comm.Send(data.numpy(), dest=to)
        if out is not None:
            self._comm.Recv(out.numpy(), source=source)

    def _alltoall(self, data: list[Tensor]) -> list[Tensor]:
        arrived = self._comm.alltoall([part.numpy() for part in data])
        return [torch.from_numpy(part) for part in arrived]

    def _sum_tensor(self, tensor: Tensor) -> Tensor:
        from mpi4py import MPI

        host = tensor.cpu().numpy()
        result = np.empty_like(host)
        self._comm.Reduce(host, result, op=MPI.SUM, root=0)
        self._comm.Bcast(result, root=0)
        return torch.from_numpy(result).to(tensor.device)
