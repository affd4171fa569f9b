"""Measurements to CSV files and TensorBoard."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class MetricsLog:
    """One CSV file per kind of row, and the same numbers for TensorBoard.

    A row is flushed when written, so that what a killed run measured is there to read. Where it
    cannot be written, as on a full disk, that is said once, and training does not end for it.
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
            folder: Where ``KIND.csv`` and the ``tensorboard`` folder go; exists.
            tensorboard: Write for TensorBoard too.
            say: Where a warning goes.
            resume_step: Rows of later steps are dropped, since a resumed run measures them
                anew; None drops all.
        """
        self._folder = folder
        self._say, self._complete = say, True
        self._resume_step = resume_step
        self._files: dict[str, tuple[Any, Any]] = {}
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if resume_step is None else resume_step + 1
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, kind: str, row: dict[str, float | int | None]) -> None:
        """Adds a row.

        Args:
            kind: Name of the CSV file without its ending.
            row: Must have a "step", and the same keys for each row of this kind. None is an
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
        kept = []
        if self._resume_step is not None and path.exists():
            kept = [row for row in read_csv(path) if row["step"] <= self._resume_step]
        partial = path.with_suffix(".partial")
        file = open(partial, "w", newline="")  # noqa: SIM115 - closed by close()
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
        file.flush()
        os.replace(partial, path)
        return file, writer


def read_csv(path: Path) -> list[dict[str, float]]:
    """Reads what `MetricsLog` wrote; empty fields are left out of their row."""
    with open(path, newline="") as file:
        return [
            {key: float(value) for key, value in row.items() if value not in ("", None)}
            for row in csv.DictReader(file)
        ]
