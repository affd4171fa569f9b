"""Being asked to stop: schedulers send a signal some time before they kill."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from multiprocessing import forkserver
from types import FrameType

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: not finished, call again. The checkpoint is written."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


PATIENCE = 60.0
"""Seconds after which a request that nobody has looked at may be repeated, and then ends this."""


class StopRequest:
    """Whether this process was sent one of `SIGNALS`; what other ranks know is not asked.

    A program that hangs never asks. It ends where another of the signals comes `PATIENCE` seconds
    or more after the first, with the exit code a shell gives to that signal, 128 + its number.
    """

    def __init__(self) -> None:
        self._received = self._seen = False

    def __call__(self) -> bool:
        """Whether to stop."""
        self._seen = self._received
        return self._received

    def listen(self, *, workers: bool = False) -> None:
        """Takes the signals from now on. Main thread only.

        Args:
            workers: The data loader is going to have worker processes, from a fork server.
        """
        if workers:
            # A scheduler may signal every process of a job. Ignoring is inherited, a handler is
            # not: so the workers outlive what is meant for their rank. But `outlive_one_sigterm`
            # is theirs, for by SIGTERM torch ends those that do not answer.
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            forkserver.ensure_running()
        for number in SIGNALS:
            signal.signal(number, self._receive)
            # MPI and DALI may not expect their system calls to be interrupted.
            signal.siginterrupt(number, False)
        # Handlers wait for the main thread, which may hang in a library; this is told at once.
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        watch = threading.Thread(
            target=self._watch, args=(reader, writer), name="signals", daemon=True
        )
        watch.start()

    def _watch(self, reader: socket.socket, writer: socket.socket) -> None:
        """Ends a process that was asked and asked again, and never looked."""
        first = None
        while number := reader.recv(1):
            if number[0] not in SIGNALS:
                continue
            now = time.monotonic()
            if first is None:
                first = now
            elif now - first >= PATIENCE and not self._seen:
                text = f"asked to stop {now - first:.0f} s ago, asked again, and hangs: ends now\n"
                os.write(2, text.encode())
                os._exit(128 + number[0])

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Nothing else: it runs between any two instructions, and no rank may act on it alone.
        self._received = True


def outlive_one_sigterm(worker: int) -> None:
    """For a loader's worker process, as it starts: the first SIGTERM is meant for its rank."""
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
