"""Several ranks in one process, one thread each: for tests, benchmarks and experiments."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from aadl_hvd.comm.base import Communicator, ShardGroup, Values
from aadl_hvd.errors import CommunicationError

T = TypeVar("T")


class _World:
    """What the threads share: one item from each rank, and a barrier."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size = size
        self.timeout = timeout
        self.items: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout)
        self.parts: dict[tuple[int, int], _World] = {}
        self.lock = threading.Lock()

    def part(self, index: int, size: int) -> _World:
        """The world of a group of these threads: the same object for all that ask."""
        with self.lock:
            return self.parts.setdefault((index, size), _World(size, self.timeout))

    def abort(self) -> None:
        with self.lock:
            for world in (self, *self.parts.values()):
                world.barrier.abort()


class SimulatedCommunicator(Communicator):
    """A rank that `run_ranks` has started."""

    def __init__(self, world: _World, rank: int) -> None:
        self._world = world
        self.rank = rank
        self.size = world.size

    def shard_group(self, count: int) -> ShardGroup:
        """This rank's group, of `count` groups of successive ranks. `count` divides `size`."""
        size = self.size // count
        index, rank = divmod(self.rank, size)
        group = SimulatedCommunicator(self._world.part(index, size), rank)
        return ShardGroup(group, count, index)

    def allgather_object(self, item: Any) -> list[Any]:
        # Its own rank may go on and change it while others still copy it.
        return [copy.deepcopy(x) for x in self._exchange(copy.deepcopy(item))]

    def _exchange(self, item: Any) -> list[Any]:
        """The items of all ranks, by rank, not copied."""
        try:
            self._world.items[self.rank] = item
            self._world.barrier.wait()
            items = list(self._world.items)
            self._world.barrier.wait()
        except threading.BrokenBarrierError:
            raise CommunicationError(
                f"Simulated rank {self.rank} waits in vain: another rank has failed, or did not "
                f"come within {self._world.timeout:g} s."
            ) from None
        return items

    def _allreduce_sum(self, values: Values) -> Values:
        return functools.reduce(np.add, self._exchange(values.copy()))

    def _allreduce_max(self, values: Values) -> Values:
        return functools.reduce(np.maximum, self._exchange(values.copy()))

    def _broadcast(self, values: Values) -> Values:
        return self._exchange(values.copy())[0].copy()  # type: ignore[no-any-return]

    def _allgather(self, block: Tensor) -> Tensor:
        return torch.cat(self._exchange(block.clone()))

    def gather_by_pieces(self, block: Tensor) -> Generator[tuple[int, Tensor], None, None]:
        """In three or four pieces, only so that tests exercise the code that uses pieces."""
        whole, rows = self.allgather(block).view(self.size, -1), max(1, block.numel() // 3)
        for first in range(0, block.numel(), rows):
            yield first, whole[:, first : first + rows].clone()

    def _send(
        self, data: Tensor | None, out: Tensor | None, length: int, source: int, to: int
    ) -> None:
        sent = self._exchange(None if data is None else data.clone())[source]
        if out is not None:
            out.copy_(sent)

    def _alltoall(self, data: list[Tensor]) -> list[Tensor]:
        sent = self._exchange([part.clone() for part in data])
        return [parts[self.rank] for parts in sent]

    def _sum_tensor(self, tensor: Tensor) -> Tensor:
        total: Tensor = functools.reduce(torch.add, self._exchange(tensor.clone()))
        return total


def run_ranks(size: int, program: Callable[[Communicator], T], timeout: float = 60.0) -> list[T]:
    """Runs `program(comm)` on `size` simulated ranks and returns their results by rank.

    Args:
        size: P, at least 1.
        program: called once for each rank, in a thread of its own.
        timeout: seconds that a rank waits for the others in a collective.

    Raises:
        Exception: the error of the first rank that failed by itself. The ranks that waited for it
            get a `CommunicationError`.
    """
    world = _World(size, timeout)

    def rank_program(rank: int) -> T:
        try:
            return program(SimulatedCommunicator(world, rank))
        except BaseException:
            world.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(rank_program, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        own = [error for error in errors if not isinstance(error, CommunicationError)]
        raise (own or errors)[0]
    return [future.result() for future in futures]
