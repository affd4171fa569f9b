"""Ranks of an MPI communicator, through mpi4py, on host memory.

Small vectors travel up and down a binomial tree in messages of our own, and waiting for one is a
loop and no call of MPI's that nobody can leave. So a rank that waits for another learns that it
has gone, and why; and messages that belong to different operations are refused, not added up.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aadl_hvd.comm.base import ADVICE, Communicator, Values, checked_tensor
from aadl_hvd.errors import CommunicationError

_VALUES, _LEFT, _WAITS, _JOINS, _ROWS = 1, 2, 3, 4, 5  # tags
_GRADIENTS = 0.0  # in place of an operation's header: waits for gradients

_SPINS = range(2000)  # looks for a message, each 0.2 microseconds, before time is given away
NAP = 1e-4  # seconds
ASK = 1.0  # seconds after which a rank that keeps others waiting is told so
GRACE = 0.1  # seconds that the last word of a rank may take

_KINDS = ("sum", "maximum", "broadcast", "gathering")
# A header is one number, exact in float64: number of the operation, kind, length of the message.
_LENGTHS = 2**24
_STEP = 4.0 * _LENGTHS


class MpiCommunicator(Communicator):
    """All of the seam's operations on an mpi4py intra-communicator.

    With Horovod on MPI it carries the tiny reductions: about 4 microseconds in place of the
    millisecond that Horovod's negotiation takes.

    A rank that waits in one raises `CommunicationError` as soon as another rank's program has
    ended, by an error or not; when MPI is shut down; when the other rank is in another operation;
    or, after a second, when that one waits for the gradients of a later step or has called
    `hvd.join()`. A rank that is merely late is waited for; after
    HOROVOD_STALL_CHECK_TIME_SECONDS (60) a warning names it, and
    HOROVOD_STALL_SHUTDOWN_TIME_SECONDS, if set, ends the wait, as in Horovod's own collectives.

    So are large blocks in host memory that are gathered by pieces: in memory that is kept, in half
    the time that Horovod takes. Every rank fetches all others' by itself: for ranks of one node.
    Other large tensors and objects go through MPI's collectives, without all that: in training
    Horovod carries them.

    Args:
        ranks: processes of MPI's world, in the order of this communicator's ranks. Collective
            over these and nobody else. `world_rank` must not be None on any of them.

    Attributes:
        on_one_node: whether all ranks are.
        piece: numbers that are gathered at a time: they are in the cache when they are used.
        left: what ranks said that have left, by rank.
    """

    piece = 2**20

    def __init__(self, ranks: list[int]) -> None:
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
        self._parent, self._children = _neighbours(self.rank, self.size)
        self._lines: dict[tuple[str, int], _Line] = {}
        self._pieces: dict[torch.dtype, NDArray[Any]] = {}  # memory, by what is in it
        # Operations, waits for gradients and hvd.join() entered.
        self._number = self._gradients = self._joins = 0
        self._code = 0.0  # header of the last operation
        self._talking = self._closed = self._all_know = False
        self._sent: list[Any] = []
        self._questions: dict[int, tuple[float, int]] = {}
        self._lock = threading.Lock()  # a notice is looked for and taken by one thread at a time
        self.left: dict[int, str] = {}
        _watch(self)

    @staticmethod
    def world_rank() -> int | None:
        """This process in MPI's world; None where MPI cannot be used from here.

        That is: mpi4py is not installed, MPI is not running (mpi4py is kept from starting it: that
        is Horovod's part), or it does not allow calls from several threads.
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
        self._gradients += 1
        started, asked = time.monotonic(), False
        while not done():
            time.sleep(NAP)
            if time.monotonic() - started > ASK:
                self._answer(done, ask=not asked)
                asked = True

    def join(self) -> None:
        """This rank calls `hvd.join()`: it takes no more steps until all others have done so."""
        self._joins += 1
        joins = np.array([float(self._joins)])
        with self._use():
            for rank in [] if self._closed else self._neighbours:
                self._sent.append(self._comm.Isend(joins, rank, _JOINS))

    def explain(self, error: Exception) -> None:
        self._hear()
        for rank, said in self.left.items():
            error.add_note(f"Rank {rank} has left: {said}")

    def _allreduce_sum(self, values: Values) -> Values:
        return self._talk("sum", values)

    def _allreduce_max(self, values: Values) -> Values:
        return self._talk("maximum", values)

    def _broadcast(self, values: Values) -> Values:
        return self._talk("broadcast", values)

    def gather_by_pieces(self, block: Tensor) -> Generator[tuple[int, Tensor], None, None]:
        block = checked_tensor(block)
        if block.device.type != "cpu":
            yield from super().gather_by_pieces(block)
            return
        numbers, length = block.numpy(), block.numel()
        # All are here, and in the same operation, before anything large is on its way.
        longest, shortest = self._talk("gathering", np.array([1.0, -1.0]) * numbers.nbytes)
        if longest != -shortest:
            raise CommunicationError(
                f"Invalid block of {numbers.nbytes} bytes on rank {self.rank}. Must be of one "
                f"length and dtype on all ranks, and is of {-shortest:.0f} to {longest:.0f} bytes."
            )
        rows = max(1, min(length, self.piece // self.size))
        memory = self._pieces.get(block.dtype)
        if memory is None or memory.size < rows * self.size:  # new memory would take as long again
            memory = self._pieces[block.dtype] = np.empty(rows * self.size, numbers.dtype)
        wanted = True
        for first in range(0, length, rows):
            own = numbers[first : first + rows]
            piece = memory[: own.size * self.size].reshape(self.size, own.size)
            self._exchange_rows(own, piece)
            if first + rows >= length:  # nobody leaves before all have everything
                self._talk("gathering", np.zeros(2))
            try:
                if wanted:
                    yield first, torch.from_numpy(piece)
            except GeneratorExit:  # the others want theirs all the same
                wanted = False

    def _exchange_rows(self, own: NDArray[Any], everybodys: NDArray[Any]) -> None:
        """This rank's rows to all, all ranks' into [size, rows]; waits as `_talk` does."""
        others = [(self.rank + i) % self.size for i in range(1, self.size)]
        requests: list[tuple[Any, int]] = []
        with self._use():
            if not self._closed:
                try:
                    for i in reversed(others):
                        requests.append((self._comm.Irecv(everybodys[i], i, _ROWS), i))
                    for i in others:
                        requests.append((self._comm.Isend(own, i, _ROWS), i))
                    everybodys[self.rank] = own
                    for request, rank in requests:
                        self._wait(request.Test, rank, self._code)
                except BaseException:
                    self._sent.append((requests, own, everybodys))  # MPI may yet use this memory
                    raise
                return
        self._give_up()

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

    def _talk(self, kind: str, values: Values) -> Values:
        """Combines vectors on their way to rank 0, or takes rank 0's, and hands that to all.

        The same bits on every rank, and in every run. Written for speed: one call of a method
        takes as long as a tenth of the message.
        """
        self._talking = True  # as `_use` does
        try:
            if self._closed or self.left:
                self._talking = False  # MPI may be at its end already
                self._give_up()
            line = self._lines.get((kind, len(values))) or self._new_line(kind, len(values))
            self._number += 1
            self._code = code = line.code + self._number * _STEP
            line.own[0] = code
            line.own_values[:] = values
            for start in line.expect:
                start()
            for test, rank, message, others in line.from_children:
                for _ in _SPINS:
                    if test():
                        break
                else:
                    self._wait(test, rank, code)
                if message[0] != code:
                    self._refuse(rank, message[0], code)
                line.combine(line.own_values, others, out=line.own_values)
            if line.from_parent is not None:
                test, rank, message, _ = line.from_parent
                line.send_up()
                for _ in _SPINS:
                    if test():
                        break
                else:
                    self._wait(test, rank, code)
                if message[0] != code:
                    self._refuse(rank, message[0], code)
            for start in line.send_down:
                start()
            result = line.result.copy()
            for test, rank in line.sent:
                for _ in _SPINS:
                    if test():
                        break
                else:
                    self._wait(test, rank, code)
            return result
        except Exception as error:
            if not _is_truncated(error):
                raise
            raise CommunicationError(
                f"A message longer than expected came to rank {self.rank} in {_words(code)}. "
                f"{ADVICE}"
            ) from None
        finally:
            self._talking = False

    def _new_line(self, kind: str, length: int) -> _Line:
        line = _Line(self._comm, self._parent, self._children, kind, length)
        self._lines[kind, length] = line
        return line

    def _refuse(self, rank: int, there: float, here: float) -> NoReturn:
        raise CommunicationError(
            f"Rank {rank} is in {_words(there)}, and this one, rank {self.rank}, in "
            f"{_words(here)}. {ADVICE}"
        )

    def _wait(self, test: Callable[[], bool], rank: int, code: float) -> None:
        """Waits for a message from or to a rank, and looks around meanwhile."""
        started, asked, warned = time.monotonic(), False, False
        warn_after, end_after = _stall_seconds()
        while not test():
            if self._closed or self._probe(_LEFT):
                self._give_up()
            waited = time.monotonic() - started
            time.sleep(NAP if waited > 100 * NAP else 0.0)
            if waited > ASK:
                self._hear_of_joins()
            if waited > ASK and not asked:
                asked = True
                here = np.array([code, self._gradients], np.float64)
                self._sent.append(self._comm.Isend(here, rank, _WAITS))
            if asked:
                for other, (there, _) in self._take_questions().items():
                    if there != code and there // _STEP == self._number:
                        self._refuse(other, there, code)  # each waits for the other to begin
            if waited > warn_after and not warned:
                warned = True
                warnings.warn(
                    f"Rank {self.rank} has waited for rank {rank} for {waited:.0f} s in an "
                    "operation of the Anderson optimizer.",
                    stacklevel=2,
                )
            if waited > end_after:
                raise CommunicationError(
                    f"Rank {self.rank} has waited for rank {rank} for {waited:.0f} s, longer than "
                    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS."
                )

    def _take_questions(self) -> dict[int, tuple[float, int]]:
        """Which operation (as in headers) other ranks waited for this one in, when they asked, and
        how many times they had waited for gradients before.
        """
        from mpi4py import MPI

        while self._probe(_WAITS, status := MPI.Status()):
            question = np.empty(2)
            self._comm.Recv(question, status.source, _WAITS)
            self._questions[status.source] = float(question[0]), int(question[1])
        return self._questions

    def _hear_of_joins(self) -> None:
        from mpi4py import MPI

        while self._probe(_JOINS, status := MPI.Status()):
            joins = np.empty(1)
            self._comm.Recv(joins, status.source, _JOINS)
            if joins[0] > self._joins:  # else it was over when this rank had joined, too
                raise CommunicationError(
                    f"Rank {status.source} has called hvd.join(), and this one, rank {self.rank}, "
                    "waits for it in an accelerated step. Acceleration needs every rank in every "
                    "step: give all ranks equally many batches."
                )

    def _answer(self, done: Callable[[], bool], ask: bool) -> None:
        """Raises if another rank waits for this one in vain while this one waits for gradients.

        Args:
            done: whether this one does no longer.
            ask: says to the next rank that this one waits: if any two differ, so do two neighbours.
        """
        with self._use():
            if self._closed:
                return
            if ask:
                here = np.array([_GRADIENTS, self._gradients], np.float64)
                self._sent.append(self._comm.Isend(here, (self.rank + 1) % self.size, _WAITS))
            for rank, (code, gradients) in self._take_questions().items():
                if code == _GRADIENTS:
                    # That one has all it knows of from this step, which this one has begun.
                    if gradients > self._gradients and not done():
                        raise CommunicationError(
                            f"Rank {rank} waits for the gradients of a later step, and this one, "
                            f"rank {self.rank}, for some that that one does not know of. {ADVICE} "
                            "So must add_param_group()."
                        )
                    continue
                # This rank has not begun what that one is in; nor that one what this rank is in,
                # which it cannot before.
                if code >= (self._number + 1) * _STEP and gradients < self._gradients:
                    raise CommunicationError(
                        f"Rank {rank} waits for this one, rank {self.rank}, in {_words(code)}, "
                        f"having waited for gradients {gradients} times; this one does so for the "
                        f"{self._gradients}th time, after {self._number} operations. {ADVICE}"
                    )

    def _give_up(self) -> NoReturn:
        self._hear()
        if not self.left:
            raise CommunicationError(
                "MPI is shut down: another rank has left, or called hvd.shutdown(). What it says "
                "itself tells why."
            )
        rank, said = next(iter(self.left.items()))
        raise CommunicationError(f"Rank {rank} has left: {said}")

    def _hear(self) -> None:
        """Waits a little for the last word of another rank."""
        deadline = time.monotonic() + GRACE
        talking = self._talking  # then MPI waits with its end
        while not self.left and time.monotonic() < deadline:
            with contextlib.nullcontext() if talking else self._use():
                if talking or not self._closed:
                    self._take_notices()
            time.sleep(NAP)

    @contextlib.contextmanager
    def _use(self) -> Iterator[None]:
        """MPI is not shut down within; whether it is, is to be asked within."""
        self._talking = True
        try:
            yield
        finally:
            self._talking = False

    @property
    def _neighbours(self) -> list[int]:
        return [*self._children, *([] if self._parent is None else [self._parent])]

    def _probe(self, tag: int, status: Any = None) -> bool:
        from mpi4py import MPI

        return bool(self._comm.Iprobe(MPI.ANY_SOURCE, tag, status))

    # Leaving

    def _take_notices(self) -> None:
        from mpi4py import MPI

        status = MPI.Status()
        with self._lock:
            while not MPI.Is_finalized() and self._probe(_LEFT, status):
                notice = bytearray(status.Get_count(MPI.BYTE))
                self._comm.Recv([notice, MPI.BYTE], status.source, _LEFT)
                self._all_know = self._all_know or notice[:1] == b"!"
                self.left[status.source] = notice[1:].decode(errors="replace")

    def leave(self, error: BaseException | None) -> None:
        """Tells those who might wait for this rank that it will not come; they learn it first hand.

        Args:
            error: why; None: its program has come to its end. Then only its neighbours in the tree
                are told: if they still wait for it, it is an error, and they tell the rest.
        """
        from mpi4py import MPI

        if self._closed or self._all_know or MPI.Is_finalized():
            return
        said = "its program has ended." if error is None else f"{type(error).__name__}: {error}"
        notice = ("." if error is None else "!") + said[:500]
        everybody = [rank for rank in range(self.size) if rank != self.rank]
        for rank in self._neighbours if error is None else everybody:
            self._sent.append(self._comm.Isend([notice.encode(), MPI.BYTE], rank, _LEFT))

    def close(self) -> None:
        """MPI is about to be finalized, by another thread than the one that talks here."""
        self._closed = True  # first: who talks after that looks at it
        while self._talking:
            time.sleep(NAP)
        self._take_notices()


class _Line:
    """Memory and requests for messages of one kind and length between a rank and its neighbours.

    A message is a header and `length` numbers. Requests are MPI's persistent ones: to start one
    takes a third of the time that mpi4py needs to look at its arguments. What is to be called is
    kept as a bound method.

    Attributes:
        code: of the kind and the length, in headers.
        combine: what becomes of values that come up.
        own: what goes up, [1 + length]; own_values without the header.
        result: what came down, [length].
        expect: to be started before messages can come.
        from_children, from_parent: whether it has come, its rank, the message and its values;
            from_parent is None on rank 0.
        send_up, send_down: to be started.
        sent: whether it has gone, and to which rank.
    """

    def __init__(
        self, comm: Any, parent: int | None, children: list[int], kind: str, length: int
    ) -> None:
        own = np.empty(1 + length)
        self.code = float(_KINDS.index(kind) * _LENGTHS + length)
        self.combine: Callable[..., Any] = np.add if kind == "sum" else np.maximum
        self.own, self.own_values = _view(own), own[1:]
        self.expect: list[Callable[[], None]] = []
        self.sent: list[tuple[Callable[[], bool], int]] = []
        upwards = kind != "broadcast"

        def receiver(rank: int) -> tuple[Callable[[], bool], int, Any, Values]:
            memory = np.empty(1 + length)
            request = comm.Recv_init(memory, rank, _VALUES)
            self.expect.append(request.Start)
            return request.Test, rank, _view(memory), memory[1:]

        def sender(memory: Values, rank: int) -> Callable[[], None]:
            request = comm.Send_init(memory, rank, _VALUES)
            self.sent.append((request.Test, rank))
            start: Callable[[], None] = request.Start
            return start

        self.from_children = [receiver(rank) for rank in children if upwards]
        self.send_up: Callable[[], None] = lambda: None
        self.from_parent, down = None, own
        if parent is not None:
            if upwards:
                self.send_up = sender(own, parent)
            self.from_parent = receiver(parent)
            down = np.asarray(self.from_parent[2])
        self.result: Values = down[1:]
        # Those with the most behind them first.
        self.send_down = [sender(down, rank) for rank in reversed(children)]


def _neighbours(rank: int, size: int) -> tuple[int | None, list[int]]:
    """Parent (None on rank 0) and children, the nearest first, in a binomial tree."""
    span = rank & -rank if rank else size
    children = [rank + 2**i for i in range(span.bit_length()) if 2**i < span]
    return (rank - span if rank else None), [child for child in children if child < size]


def _view(array: Values) -> Any:
    """Its items are floats, read and written in half the time that an array needs."""
    view: Any = memoryview
    return view(array)


def _words(code: float) -> str:
    number, rest = divmod(int(code), int(_STEP))
    kind, length = divmod(rest, _LENGTHS)
    return f"its operation {number}, a {_KINDS[kind]} of {length} numbers"


def _is_truncated(error: Exception) -> bool:
    from mpi4py import MPI

    return isinstance(error, MPI.Exception) and error.Get_error_class() == MPI.ERR_TRUNCATE


def _stall_seconds() -> tuple[float, float]:
    """When Horovod would warn of a collective that does not begin, and when it would end it."""
    if os.environ.get("HOROVOD_STALL_CHECK_DISABLE", "0") not in ("", "0"):
        return np.inf, np.inf
    warn = float(os.environ.get("HOROVOD_STALL_CHECK_TIME_SECONDS") or 60.0)
    end = float(os.environ.get("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS") or 0.0)
    return warn, end if end > 0.0 else np.inf


_communicators: weakref.WeakSet[MpiCommunicator] = weakref.WeakSet()
_watched: list[int] = []  # this process, once it watches


def _watch(communicator: MpiCommunicator) -> None:
    """Sees to it that a communicator hears of this program's end and of MPI's."""
    from mpi4py import MPI

    _communicators.add(communicator)
    if _watched:
        return
    _watched.append(os.getpid())
    # Hooks run in the reverse order: this one before Horovod's, which shuts MPI down.
    atexit.register(_leave)
    # The standard's own hook on MPI_Finalize. Horovod calls that, in a thread of its own, when any
    # rank shuts Horovod down; a call of MPI after it would abort the process.
    keyval = MPI.Comm.Create_keyval(delete_fn=_close)
    MPI.COMM_SELF.Set_attr(keyval, None)


def _leave() -> None:
    if os.getpid() not in _watched:
        return  # a fork
    for communicator in list(_communicators):
        communicator.leave(getattr(sys, "last_value", None))


def _close(*_: Any) -> None:
    for communicator in list(_communicators):
        communicator.close()
