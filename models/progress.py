"""Progress on rank 0: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from models.engine import Interval

LINE_SECONDS = 5.0

# Names of the programs that start ranks and pass on their output.
_LAUNCHERS = {"horovodrun", "mpirun", "mpiexec", "orterun", "prterun", "srun", "jsrun"}
_HOROVODRUN = "horovod.runner"  # started as a module


class Progress:
    """Shows steps/s, images/s, loss and counts of the acceleration, on rank 0 only."""

    def __init__(self, kind: str, *, total: int, done: int, chief: bool = True) -> None:
        """Starts the display.

        Args:
            kind: "bar", "lines", "off", or "auto". "auto" is a bar if stderr of this process or of
                the program that started the ranks is a terminal, else lines.
            total: Steps of the whole training.
            done: Steps done before, by the run that is resumed.
            chief: This is rank 0; the others show nothing.
        """
        self._chief = chief
        kind = kind if chief else "off"
        # A launcher puts a tag before each line of a rank, and takes a carriage return for a line
        # end. So a bar has to bypass it.
        self._terminal = launchers_terminal() if kind in ("auto", "bar") else None
        if kind == "auto":
            kind = "bar" if self._terminal or sys.stderr.isatty() else "lines"
        self._kind, self._total = kind, total
        self._printed = time.monotonic()
        self._bar: Any = None
        self._lines: TextIO = sys.stdout
        if kind == "bar":
            from tqdm import tqdm

            file = sys.stderr
            if self._terminal is not None:
                file, self._lines = self._terminal
                # mpirun starts ranks in the background. Under `stty tostop` a write to the
                # terminal would stop them.
                signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            # A terminal of unknown width, as under docker, would get a bar of width 0.
            known = not file.isatty() or os.get_terminal_size(file.fileno()).columns > 0
            width: dict[str, Any] = {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 20}
            self._bar = tqdm(total=total, initial=done, unit="step", file=file, **width)

    def update(self, interval: Interval, epoch: int, anderson: Any) -> None:
        """Shows an interval.

        Args:
            interval: The measurements.
            epoch: Counted from 1.
            anderson: The optimizer's ``anderson.stats``; None without acceleration.
        """
        if self._kind == "off":
            return
        rate = interval.images / interval.seconds
        texts = {"epoch": str(epoch), "loss": f"{interval.loss:.4g}", "images/s": f"{rate:.0f}"}
        if anderson is not None:
            texts["AA"] = f"{anderson.accelerated}+/{sum(anderson.rejected.values())}-"
        if self._bar is not None:
            with self._without_terminal():
                self._bar.set_postfix(texts, refresh=False)
                self._bar.update(interval.steps)
        elif time.monotonic() - self._printed > LINE_SECONDS or interval.step == self._total:
            self._printed = time.monotonic()
            pace = f"{interval.steps / interval.seconds:.2f} steps/s"
            self.say(
                f"step {interval.step}/{self._total}  {pace}  "
                + "  ".join(f"{name} {text}" for name, text in texts.items())
            )

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar, unless progress is off."""
        if self._kind != "off":
            self.warn(text)

    def warn(self, text: str) -> None:
        """Prints a line even if progress is off."""
        if not self._chief:
            return
        if self._bar is not None:
            with self._without_terminal():
                self._bar.write(text, file=self._lines)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Closes the bar and the terminal."""
        with self._without_terminal():
            if self._bar is not None:
                self._bar.close()
            if self._terminal is not None:
                self._terminal[0].close()

    @contextlib.contextmanager
    def _without_terminal(self) -> Iterator[None]:
        """Switches to lines if the terminal closes before the training ends."""
        try:
            yield
        except OSError:
            self._kind, self._bar, self._terminal = "lines", None, None


def launchers_terminal() -> tuple[TextIO, TextIO] | None:
    """Finds the terminal of the program that started this rank, on the same machine.

    Returns:
        The stream for a bar and the stream for lines. The bar goes to the terminal of the
        launcher's stderr. Lines go there, too, if the launcher's stdout is the same terminal, else
        to this rank's stdout. None if there is no launcher, or if its stderr is no terminal.
    """
    try:
        launcher, pid = None, os.getppid()
        while pid > 1:  # the topmost: horovodrun starts mpirun
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            names = {os.path.basename(word) for word in words[:2]}
            if names & _LAUNCHERS or any(_HOROVODRUN in word for word in words[:3]):
                launcher = pid
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if launcher is None:
            return None
        stdout, stderr = Path(f"/proc/{launcher}/fd/1"), Path(f"/proc/{launcher}/fd/2")
        if not stderr.is_char_device():  # opening a pipe could wait for ever
            return None
        terminal = os.fdopen(os.open(stderr, os.O_WRONLY | os.O_NOCTTY), "w")
        if not terminal.isatty():
            terminal.close()
            return None
        return terminal, terminal if stdout.samefile(stderr) else sys.stdout
    except OSError:  # the launcher ended or is another user's, or there is no /proc
        return None
