"""Operations on small vectors, along a binomial tree of ranks, on host memory.

Each message is sent and received by a persistent request of MPI. Starting one takes a third of the
time in which mpi4py checks the arguments of an ordinary call. A rank waits in a loop of its own and
not in a call of MPI's, because such a call never ends when the other rank is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from aadl_hvd.comm.base import ADVICE, Values
from aadl_hvd.comm.messages import (
    NO_OPERATION,
    PER_OPERATION,
    Tag,
    in_words,
    kind_and_length,
    refuse,
)
from aadl_hvd.errors import CommunicationError

# How often a rank tests for a message before `wait` is called. A test takes 0.2 microseconds.
_SPINS = range(2000)


def _keep_own(own: Values, others: Values, out: Values) -> None:
    """In a broadcast: rank 0 ends with its own values."""


_COMBINE: dict[str, Callable[..., Any]] = {
    "sum": np.add,
    "maximum": np.maximum,
    "broadcast": _keep_own,
    "gathering": np.maximum,
}

Test = Callable[[], bool]
"""Whether a message has arrived, or has been sent."""

Wait = Callable[[Test, int, float], None]
"""Returns when the test is true, for a message from or to a rank, in the operation of a header."""


class Tree:
    """Reduces and broadcasts float64 vectors; rank 0 is the root.

    Args:
        comm: an mpi4py intra-communicator. No one else sends messages with `Tag.VALUES` on it.

    Attributes:
        neighbours: the ranks that this rank exchanges messages with.
        header: of the operation that this rank entered last.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._rank: int = comm.Get_rank()
        self._parent, self._children = parent_and_children(self._rank, comm.Get_size())
        self.neighbours = [*self._children, *([] if self._parent is None else [self._parent])]
        self.header = NO_OPERATION
        self._number = 0
        self._requests: dict[tuple[str, int], _Requests] = {}

    def run(self, kind: str, values: Values, wait: Wait) -> Values:
        """One operation. Collective.

        The result has the same bits on every rank and in every run. The code is written for speed:
        one call of a Python method takes as long as a tenth of the message.

        Args:
            kind: one of `messages.KINDS`. "broadcast" gives the values of rank 0, "maximum" and
                "gathering" the largest ones. In all of them messages go up first. So no rank is
                done, and may exit, before all have begun.
            values: [k] float64, k the same on every rank.
            wait: is called where a message does not come soon. It may raise.

        Returns:
            [k] float64, in new memory.

        Raises:
            CommunicationError: a message of another operation has come.
        """
        key = kind, len(values)
        requests = self._requests.get(key)
        if requests is None:
            requests = self._requests[key] = _Requests(
                self._comm, self._parent, self._children, kind, len(values)
            )
        self._number += 1
        self.header = header = requests.kind_and_length + self._number * PER_OPERATION
        try:
            requests.own[0] = header
            requests.own_values[:] = values
            for start in requests.expect:
                start()
            for test, rank, message, others in requests.from_children:
                for _ in _SPINS:
                    if test():
                        break
                else:
                    wait(test, rank, header)
                if message[0] != header:
                    refuse(rank, message[0], self._rank, header)
                requests.combine(requests.own_values, others, out=requests.own_values)
            if requests.from_parent is not None:
                test, rank, message, _ = requests.from_parent
                requests.send_up()
                for _ in _SPINS:
                    if test():
                        break
                else:
                    wait(test, rank, header)
                if message[0] != header:
                    refuse(rank, message[0], self._rank, header)
            for start in requests.send_down:
                start()
            result = requests.result.copy()
            for test, rank in requests.sent:
                for _ in _SPINS:
                    if test():
                        break
                else:
                    wait(test, rank, header)
            return result
        except Exception as error:
            if not _is_truncated(error):
                raise
            raise CommunicationError(
                f"Rank {self._rank} has received a message that is too long, in "
                f"{in_words(header)}. {ADVICE}"
            ) from None


class _Requests:
    """Memory and persistent requests for all operations of one kind and length on this rank.

    A message is a header and `length` numbers. Methods that `Tree.run` calls are kept bound, which
    saves a look-up in each call.

    Attributes:
        kind_and_length: part of the header.
        combine: the operation on two vectors.
        own: what this rank sends up, [1 + length]; `own_values` is the same without the header.
        result: what comes down, [length].
        expect: starts the requests that receive.
        from_children, from_parent: test of the request that receives, the rank, the message, its
            values. `from_parent` is None on rank 0.
        send_up, send_down: start the requests that send.
        sent: tests of the requests that send, and the rank.
    """

    def __init__(
        self, comm: Any, parent: int | None, children: list[int], kind: str, length: int
    ) -> None:
        own = np.empty(1 + length)
        self.kind_and_length = kind_and_length(kind, length)
        self.combine: Callable[..., Any] = _COMBINE[kind]
        self.own, self.own_values = _view(own), own[1:]
        self.expect: list[Callable[[], None]] = []
        self.sent: list[tuple[Test, int]] = []

        def receiver(rank: int) -> tuple[Test, int, Any, Values]:
            memory = np.empty(1 + length)
            request = comm.Recv_init(memory, rank, Tag.VALUES)
            self.expect.append(request.Start)
            return request.Test, rank, _view(memory), memory[1:]

        def sender(memory: Values, rank: int) -> Callable[[], None]:
            request = comm.Send_init(memory, rank, Tag.VALUES)
            self.sent.append((request.Test, rank))
            start: Callable[[], None] = request.Start
            return start

        self.from_children = [receiver(rank) for rank in children]
        self.send_up: Callable[[], None] = lambda: None
        self.from_parent, down = None, own
        if parent is not None:
            self.send_up = sender(own, parent)
            self.from_parent = receiver(parent)
            down = np.asarray(self.from_parent[2])
        self.result: Values = down[1:]
        # The last child has the largest subtree, so it is served first.
        self.send_down = [sender(down, rank) for rank in reversed(children)]


def parent_and_children(rank: int, size: int) -> tuple[int | None, list[int]]:
    """Parent (None on rank 0) and children, the nearest first, in a binomial tree."""
    span = rank & -rank if rank else size
    children = [rank + 2**i for i in range(span.bit_length()) if 2**i < span]
    return (rank - span if rank else None), [child for child in children if child < size]


def _view(array: Values) -> Any:
    """The same memory. Its items are Python floats, which takes half the time of an array's."""
    view: Any = memoryview
    return view(array)


def _is_truncated(error: Exception) -> bool:
    from mpi4py import MPI

    return isinstance(error, MPI.Exception) and error.Get_error_class() == MPI.ERR_TRUNCATE
