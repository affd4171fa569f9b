"""Requests to stop: schedulers send a signal some time before they kill a job."""

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
"""Seconds from a request that was not looked at; a further request after them ends the process."""


class StopRequest:
    """Whether this process received one of `SIGNALS`. Other ranks are not asked.

    A program that hangs never looks. It ends if a further signal comes `PATIENCE` seconds or more
    after the first. Its exit code is then a shell's for that signal, 128 + its number.
    """

    def __init__(self) -> None:
        self._received = self._seen = False

    def __call__(self) -> bool:
        """Whether to stop."""
        self._seen = self._received
        return self._received

    def listen(self, *, workers: bool = False) -> None:
        """Handles the signals from now on. Main thread only.

        Args:
            workers: The data loader will have worker processes, from a fork server.
        """
        if workers:
            # A scheduler may signal every process of a job. Workers inherit ignored signals but no
            # handlers, so they survive a signal that is meant for their rank. They then call
            # `outlive_one_sigterm`, since torch ends hanging workers by SIGTERM.
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            forkserver.ensure_running()
        for number in SIGNALS:
            signal.signal(number, self._receive)
            # MPI and DALI may not expect their system calls to be interrupted.
            signal.siginterrupt(number, False)
        # Handlers wait for the main thread, which may hang in a library. This thread does not.
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        watch = threading.Thread(
            target=self._watch, args=(reader, writer), name="signals", daemon=True
        )
        watch.start()

    def _watch(self, reader: socket.socket, writer: socket.socket) -> None:
        """Ends the process if it is asked again and has never looked."""
        first = None
        while number := reader.recv(1):
            if number[0] not in SIGNALS:
                continue
            now = time.monotonic()
            if first is None:
                first = now
            elif now - first >= PATIENCE and not self._seen:
                text = f"asked to stop {now - first:.0f} s ago and again now, but hangs: ends now\n"
                os.write(2, text.encode())
                os._exit(128 + number[0])

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Nothing else: a handler runs between any two instructions, and no rank may act alone.
        self._received = True


def outlive_one_sigterm(worker: int) -> None:
    """Lets a loader's worker process ignore the first SIGTERM, which is meant for its rank."""
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
