"""Being asked to stop: schedulers send a signal some time before they kill."""

from __future__ import annotations

import signal
from multiprocessing import forkserver
from types import FrameType

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: not finished, call again. The checkpoint is written."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether this process was sent one of `SIGNALS`; what other ranks know is not asked."""

    def __init__(self) -> None:
        self._received = False

    def __call__(self) -> bool:
        """Whether to stop."""
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

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Nothing else: it runs between any two instructions, and no rank may act on it alone.
        self._received = True


def outlive_one_sigterm(worker: int) -> None:
    """For a loader's worker process, as it starts: the first SIGTERM is meant for its rank."""
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
