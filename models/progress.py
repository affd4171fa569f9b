"""Progress on rank 0: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time
from typing import Any

from models.engine import Interval

LINE_SECONDS = 5.0


class Progress:
    """Shows steps/s, images/s, loss and what the acceleration does; silent on other ranks."""

    def __init__(self, kind: str, *, total: int, done: int, accelerated: bool) -> None:
        """Starts the display.

        Args:
            kind: "bar", "lines", "off", or "auto": a bar where stderr is a terminal, else lines.
            total: Steps of the whole training.
            done: Steps done before, by the run that is resumed.
            accelerated: Show accepted and rejected accelerations.
        """
        if kind == "auto":
            kind = "bar" if sys.stderr.isatty() else "lines"
        self._kind, self._total, self._accelerated = kind, total, accelerated
        self._printed = time.monotonic()
        self._bar: Any = None
        if kind == "bar":
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def update(self, interval: Interval, epoch: int, anderson: Any) -> None:
        """Shows an interval.

        Args:
            interval: What was measured.
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
        """Prints a line without breaking the bar."""
        if self._kind == "off":
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.close()
