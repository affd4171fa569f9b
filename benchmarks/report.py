"""Common parts of benchmarks: a table on the screen, a JSON file, medians with their spread."""

from __future__ import annotations

import datetime
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.launch import describe_machine
from models.errors import UserError

RESULTS = Path("benchmarks/results")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; a single value is all three."""
    first, median, third = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else [values[0]] * 3
    )
    return {"median": median, "first_quartile": first, "third_quartile": third}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that lines up on a screen; first column to the left, others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in (head, rule, *rows):
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def whiskers(spreads: Sequence[dict[str, float]], unit: float = 1.0) -> list[list[float]]:
    """matplotlib's `yerr`: distances from medians to first and third quartiles, over `unit`."""
    return [
        [(s["median"] - s["first_quartile"]) / unit for s in spreads],
        [(s["third_quartile"] - s["median"]) / unit for s in spreads],
    ]


def save(figure: Any, path: Path) -> None:
    """Writes a plot beside the JSON file `path`."""
    figure.savefig(path.with_suffix(".png"), dpi=110)


def prepare(folder: Path) -> None:
    """Makes the folder for results, before anything is measured.

    Raises:
        UserError: it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out is in {folder}, which cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out is in {folder}, must be a folder that can be written to")


def write(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Writes results as JSON, with date, machine and versions. The write is atomic.

    Returns:
        The written content.
    """
    everything = {"date": str(datetime.date.today()), "machine": describe_machine(), **results}
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(everything, indent=2) + "\n")
    os.replace(unfinished, path)
    return everything
