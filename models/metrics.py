"""Writes measurements to CSV files and TensorBoard."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.output import TENSORBOARD


class MetricsLog:
    """One CSV file per kind of row, and the same numbers for TensorBoard.

    A row is flushed when written, so that a killed run leaves its measurements. If a row cannot be
    written, as on a full disk, there is one warning, and training goes on.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool,
        say: Callable[[str], None],
        resume_step: int | None = None,
    ) -> None:
        """Opens the log.

        Args:
            folder: Existing folder for ``KIND.csv`` and the ``tensorboard`` folder.
            tensorboard: Write for TensorBoard too.
            say: Called with each message for the user.
            resume_step: Rows of later steps are dropped, since a resumed run measures them
                anew; None drops all rows.
        """
        self._folder = folder
        self._say, self._complete = say, True
        self._resume_step = resume_step
        self._files: dict[str, tuple[Any, Any]] = {}
        self._board = None
        if tensorboard:
            purge = None if resume_step is None else resume_step + 1
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=purge)
            except ImportError as error:
                say(f"warning: nothing is written for TensorBoard: {error}")
            except OSError as error:
                self._lost(error)

    def write(self, kind: str, row: dict[str, float | int | None]) -> None:
        """Adds a row.

        Args:
            kind: Name of the CSV file without its suffix.
            row: Must have a "step", and the same keys for each row of this kind. None becomes an
                empty field.
        """
        try:
            self._write(kind, row)
        except OSError as error:
            self._lost(error)

    def close(self) -> None:
        """Closes all files."""
        for file in [*(file for file, _ in self._files.values()), self._board]:
            if file is not None:
                try:
                    file.close()
                except OSError as error:
                    self._lost(error)

    def _lost(self, error: OSError) -> None:
        if self._complete:
            self._say(
                f"warning: measurements in {self._folder} are incomplete from here on: {error}"
            )
        self._complete = False

    def _write(self, kind: str, row: dict[str, float | int | None]) -> None:
        if kind not in self._files:
            self._files[kind] = self._open(self._folder / f"{kind}.csv", list(row))
        file, writer = self._files[kind]
        writer.writerow(row)
        file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(f"{kind}/{name}", value, row["step"])

    def _open(self, path: Path, columns: list[str]) -> tuple[Any, Any]:
        """Opens a file that keeps its rows up to the resumed step, as they are written there.

        Columns that only the kept rows have stay, too; an older version may have written them.
        """
        kept: list[dict[str, str]] = []
        if self._resume_step is not None and path.exists():
            rows, damaged = _rows(path)
            kept = [row for row in rows if float(row["step"]) <= self._resume_step]
            if dropped := len(rows) - len(kept):
                self._say(
                    f"{path.name}: {dropped} rows after step {self._resume_step}, from which this "
                    "training goes on, are removed"
                )
            if damaged:
                self._say(f"warning: damaged lines of {path} were left out: {damaged}")
        columns += [name for name in (kept[0] if kept else ()) if name not in columns]
        partial = path.with_suffix(".partial")
        file = open(partial, "w", newline="")  # noqa: SIM115 - closed by close()
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
        file.flush()
        os.replace(partial, path)
        return file, writer


def read_csv(path: Path) -> list[dict[str, float]]:
    """Reads a file of `MetricsLog` as one dict per row, without empty fields.

    Whole numbers become ints. Damaged lines are left out; a killed run may leave one.
    """
    return [{name: _number(text) for name, text in row.items() if text} for row in _rows(path)[0]]


def _rows(path: Path) -> tuple[list[dict[str, str]], int]:
    """Returns the complete rows of a file as they are written, and the number of other lines."""
    text = path.read_bytes().decode(errors="replace")
    # A line without its newline may be cut off within a number, so it does not count as complete.
    *lines, rest = text.split("\n")
    columns, *fields = [line.rstrip("\r").split(",") for line in lines] or [[]]
    rows = [dict(zip(columns, row, strict=True)) for row in fields if _is_whole(row, columns)]
    return rows, len(fields) - len(rows) + bool(rest)


def _is_whole(row: list[str], columns: list[str]) -> bool:
    try:
        numbers = [float(text) if text else None for text in row]
        step = dict(zip(columns, numbers, strict=True))["step"]
    except (ValueError, KeyError):
        return False
    return step is not None and math.isfinite(step)


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)
