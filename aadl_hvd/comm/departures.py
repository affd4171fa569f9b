"""Ranks that leave, and how the others learn of it instead of waiting for ever.

A rank that ends, with an error or without, sends a notice from an exit hook. A rank that waits
looks for notices. If it has waited for a second, it also asks the other rank where that one is
(a question), and looks whether a rank has called `hvd.join()`.
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
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np

from aadl_hvd.comm.base import ADVICE
from aadl_hvd.comm.messages import NO_OPERATION, Tag, in_words, operation_number, refuse
from aadl_hvd.errors import CommunicationError

NAP = 1e-4  # seconds between two tests, once a rank has waited a while
ASK_AFTER = 1.0  # seconds until a rank that waits asks the other one where it is
NOTICE_TIME = 0.1  # seconds that a notice may take to arrive
LATE = 5.0  # seconds that a message may take to arrive after another rank's program has ended

_ERROR, _END = "!", "."  # first character of a notice


class Departures:
    """What this rank knows of ranks of one communicator that have left, or never come.

    A thread of Horovod's may finalize MPI at any time. A call of MPI after that aborts the process.
    So every use of the communicator has this form, which holds up the end of MPI:

        with departures.in_use():
            if not departures.over:
                ...  # calls of MPI
                return
        departures.give_up()

    Args:
        comm: an mpi4py intra-communicator.
        neighbours: the ranks that this rank exchanges messages with.
        place: the host of a rank in words, after the rank's name; see `Hosts.place`.

    Attributes:
        busy: this rank uses MPI. `in_use()` sets it.
        over: no other operation begins: a rank has left, or MPI is being finalized. The one under
            way may still end well.
    """

    def __init__(
        self, comm: Any, neighbours: list[int], place: Callable[[int], str] = lambda rank: ""
    ) -> None:
        self._comm, self._place = comm, place
        self._rank: int = comm.Get_rank()
        self._size: int = comm.Get_size()
        self._neighbours = neighbours
        self.busy = self.over = False
        self._closed = False  # MPI has been finalized, or is about to be
        self._left: dict[int, str] = {}  # what each rank that has left has said
        self._all_know = False  # a rank has told all others of an error
        self._gradients = self._joins = 0  # how often this rank has waited for them; has joined
        self._questions: dict[int, tuple[float, int]] = {}
        self._sent: list[Any] = []  # requests that may be under way: MPI needs their memory
        self._lock = threading.Lock()  # one thread at a time looks for a notice and receives it
        _register(self)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """MPI is not finalized within. The caller looks at `over` within."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def wait(self, test: Callable[[], bool], rank: int, header: float) -> None:
        """Waits for a message from or to a rank. `busy` is set.

        Args:
            test: whether it has come, or gone.
            rank: the other rank.
            header: of the operation that this rank is in.

        Raises:
            CommunicationError: the message will not come, as far as this rank can know; or it has
                not come within HOROVOD_STALL_SHUTDOWN_TIME_SECONDS.
        """
        started, asked, warned = time.monotonic(), False, False
        warn_after, end_after = _stall_seconds()
        while not test():
            if self.over or self._probe(Tag.LEFT):
                if self._comes(test):
                    return
                self.give_up()
            waited = time.monotonic() - started
            time.sleep(NAP if waited > 100 * NAP else 0.0)
            if waited > ASK_AFTER:
                self._check_joins()
            if waited > ASK_AFTER and not asked:
                asked = True
                self._ask(rank, header)
            if asked:
                for other, (there, _) in self._take_questions().items():
                    # Each waits for the other one to begin.
                    if there != header and operation_number(there) == operation_number(header):
                        refuse(other, there, self._rank, header)
            if waited > warn_after and not warned:
                warned = True
                warnings.warn(
                    f"Rank {self._rank} has waited for rank {rank}{self._place(rank)} for "
                    f"{waited:.0f} s, in an operation of the Anderson optimizer.",
                    stacklevel=2,
                )
            if waited > end_after:
                raise CommunicationError(
                    f"Rank {self._rank} has waited for rank {rank}{self._place(rank)} for "
                    f"{waited:.0f} s. That is longer than HOROVOD_STALL_SHUTDOWN_TIME_SECONDS."
                )

    def _comes(self, test: Callable[[], bool]) -> bool:
        """Whether a message still comes after a rank has left. `busy` is set.

        A rank that is done with the last operation of its program leaves, while others in the same
        operation still wait for their messages.
        """
        deadline = time.monotonic() + LATE
        while not test():
            self._take_notices()
            if self._all_know or time.monotonic() > deadline:
                return test()
            time.sleep(NAP)
        return True

    def poll_until(self, done: Callable[[], bool], header: float) -> None:
        """Waits for gradients, as `Communicator.poll_until`.

        Args:
            done: whether they are there.
            header: of the operation that this rank entered last.
        """
        self._gradients += 1
        started, asked = time.monotonic(), False
        while not done():
            time.sleep(NAP)
            if time.monotonic() - started > ASK_AFTER:
                with self.in_use():
                    if not self._closed:
                        if not asked:
                            # If any two ranks differ, then two neighbours in this ring do.
                            self._ask((self._rank + 1) % self._size, NO_OPERATION)
                        self._check_questions(done, header)
                asked = True

    def announce_join(self) -> None:
        """This rank calls `hvd.join()`: it takes no more steps until all others have done so."""
        self._joins += 1
        joins = np.array([float(self._joins)])
        with self.in_use():
            for rank in [] if self._closed else self._neighbours:
                self._sent.append(self._comm.Isend(joins, rank, Tag.JOIN))

    def explain(self, error: Exception) -> None:
        """Adds what ranks said that have left, as notes."""
        self._await_notice()
        for rank, said in self._left.items():
            error.add_note(f"Rank {rank}{self._place(rank)} has left: {said}")

    def give_up(self) -> NoReturn:
        """Raises `CommunicationError`: another rank has left or MPI is finalized. Says why."""
        self._await_notice()
        if not self._left:
            raise CommunicationError(
                "MPI is shut down: another rank has left, or has called hvd.shutdown(). See the "
                "output of the other ranks for the reason."
            )
        rank, said = next(iter(self._left.items()))
        raise CommunicationError(f"Rank {rank}{self._place(rank)} has left: {said}")

    def keep(self, *memory: Any) -> None:
        """Keeps memory that MPI may still read or write."""
        self._sent.append(memory)

    def _ask(self, rank: int, header: float) -> None:
        """Tells a rank that this one waits, in which operation, and after which gradients."""
        question = np.array([header, self._gradients], np.float64)
        self._sent.append(self._comm.Isend(question, rank, Tag.QUESTION))

    def _take_questions(self) -> dict[int, tuple[float, int]]:
        """The last question of every rank that has asked: header, and count of gradients."""
        from mpi4py import MPI

        while self._probe(Tag.QUESTION, status := MPI.Status()):
            question = np.empty(2)
            self._comm.Recv(question, status.source, Tag.QUESTION)
            self._questions[status.source] = float(question[0]), int(question[1])
        return self._questions

    def _check_questions(self, done: Callable[[], bool], header: float) -> None:
        """Raises if a rank waits in vain for this one, while this one waits for gradients."""
        entered = operation_number(header)
        for rank, (there, gradients) in self._take_questions().items():
            if there == NO_OPERATION:
                # That rank has entered every reduction that it knows of, up to this rank's step.
                if gradients > self._gradients and not done():
                    raise CommunicationError(
                        f"Rank {rank} waits for the gradients of a later step. This rank, "
                        f"{self._rank}, waits for gradients that rank {rank} does not know of. "
                        f"{ADVICE} The same holds for add_param_group()."
                    )
                continue
            # This rank has not begun the operation of that one. That one cannot begin what this
            # rank is in before its operation ends.
            if operation_number(there) > entered and gradients < self._gradients:
                raise CommunicationError(
                    f"Rank {rank} waits for this rank, {self._rank}, in {in_words(there)}. It has "
                    f"waited for gradients {gradients} times. This rank waits for gradients for "
                    f"the {self._gradients}th time and has entered {entered} operations. {ADVICE}"
                )

    def _check_joins(self) -> None:
        """Raises if a rank has called `hvd.join()` that this rank waits for."""
        from mpi4py import MPI

        while self._probe(Tag.JOIN, status := MPI.Status()):
            joins = np.empty(1)
            self._comm.Recv(joins, status.source, Tag.JOIN)
            if joins[0] > self._joins:  # an earlier join ended when this rank had joined, too
                raise CommunicationError(
                    f"Rank {status.source}{self._place(status.source)} has called hvd.join(). "
                    f"This rank, {self._rank}, waits for it in an accelerated step. Acceleration "
                    "needs every rank in every step. Give all ranks equally many batches."
                )

    def _await_notice(self) -> None:
        """Returns when a rank is known to have left, or after `NOTICE_TIME`."""
        deadline = time.monotonic() + NOTICE_TIME
        busy = self.busy  # MPI is not finalized meanwhile, although `_closed` may be set
        while not self._left and time.monotonic() < deadline:
            with contextlib.nullcontext() if busy else self.in_use():
                if busy or not self._closed:
                    self._take_notices()
            time.sleep(NAP)

    def _take_notices(self) -> None:
        from mpi4py import MPI

        status = MPI.Status()
        with self._lock:
            while not MPI.Is_finalized() and self._probe(Tag.LEFT, status):
                notice = bytearray(status.Get_count(MPI.BYTE))
                self._comm.Recv([notice, MPI.BYTE], status.source, Tag.LEFT)
                self._all_know = self._all_know or notice[:1] == _ERROR.encode()
                self._left[status.source] = notice[1:].decode(errors="replace")
                self.over = True

    def _probe(self, tag: int, status: Any = None) -> bool:
        from mpi4py import MPI

        return bool(self._comm.Iprobe(MPI.ANY_SOURCE, tag, status))

    def leave(self, error: BaseException | None) -> None:
        """Sends a notice to the ranks that might wait for this one.

        Args:
            error: why this rank leaves. None: its program has ended. Then only its neighbours are
                told. If they still wait for this rank, that is an error, and they tell the others.
        """
        from mpi4py import MPI

        said = "its program has ended." if error is None else f"{type(error).__name__}: {error}"
        notice = ((_END if error is None else _ERROR) + said[:500]).encode()
        everybody = [rank for rank in range(self._size) if rank != self._rank]
        with self.in_use():
            if self._closed or self._all_know or MPI.Is_finalized():
                return
            for rank in self._neighbours if error is None else everybody:
                self._sent.append(self._comm.Isend([notice, MPI.BYTE], rank, Tag.LEFT))

    def close(self) -> None:
        """MPI is about to be finalized. Another thread calls this than the one that uses MPI."""
        self._closed = self.over = True  # first: the other thread looks at it once it is busy
        while self.busy:
            time.sleep(NAP)
        self._take_notices()


def _stall_seconds() -> tuple[float, float]:
    """Seconds after which Horovod warns of a collective that does not begin, and ends it."""
    if os.environ.get("HOROVOD_STALL_CHECK_DISABLE", "0") not in ("", "0"):
        return np.inf, np.inf
    warn = float(os.environ.get("HOROVOD_STALL_CHECK_TIME_SECONDS") or 60.0)
    end = float(os.environ.get("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS") or 0.0)
    return warn, end if end > 0.0 else np.inf


_registered: weakref.WeakSet[Departures] = weakref.WeakSet()
_hooked: list[int] = []  # id of the process that has the hooks


def _register(departures: Departures) -> None:
    """Sees to it that `leave` and `close` are called at the end of the program and of MPI."""
    from mpi4py import MPI

    _registered.add(departures)
    if _hooked:
        return
    _hooked.append(os.getpid())
    # Hooks run in the reverse order. So this one runs before Horovod's, which finalizes MPI.
    atexit.register(_leave)
    # MPI_Finalize deletes the attributes of COMM_SELF first: the hook that the standard provides.
    # Horovod calls MPI_Finalize in a thread of its own when any rank shuts Horovod down.
    keyval = MPI.Comm.Create_keyval(delete_fn=_close)
    MPI.COMM_SELF.Set_attr(keyval, None)


def _leave() -> None:
    if os.getpid() not in _hooked:
        return  # a fork, which is no rank
    for departures in list(_registered):
        departures.leave(getattr(sys, "last_value", None))


def _close(*_: Any) -> None:
    for departures in list(_registered):
        departures.close()
