"""results.json: all runs so far, one per line, and the conditions they were made under."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from models.errors import UserError

FORMAT = 2
Run = dict[str, Any]
Key = tuple[str, str, int]


def key(run: Run) -> Key:
    """The key of a run: (problem, contender, seed)."""
    return run["problem"], run["contender"], run["seed"]


class Results:
    """The content of results.json.

    Args:
        path: the file; need not exist.

    Attributes:
        head: conditions, machine, versions, date and arguments of the last launch.
        runs: runs by (problem, contender, seed).

    Raises:
        UserError: the file holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.head: dict[str, Any] = {}
        self.runs: dict[Key, Run] = {}
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text())
            if content.pop("format") != FORMAT:
                raise KeyError
            self.runs = {key(run): run for run in content.pop("runs")}
            self.head = content
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} holds no results of this program: move it away") from None

    def check(self, conditions: dict[str, Any]) -> None:
        """Refuses to mix runs that cannot be compared.

        Raises:
            UserError: the file's runs were made under other conditions.
        """
        if not self.runs:
            return
        for name, value in self.head["conditions"].items():
            if conditions.get(name) != value:
                raise UserError(
                    f"{self.path} has runs with {name} = {value}, and now it is "
                    f"{conditions.get(name)}: choose another --out"
                )

    def add(self, run: Run) -> None:
        """Adds a run, or replaces it."""
        self.runs[key(run)] = run

    def write(self) -> None:
        """Writes the file atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"format": FORMAT, **self.head}, indent=1)
        lines = ",\n".join(
            json.dumps(plain(self.runs[k]), separators=(",", ":")) for k in sorted(self.runs)
        )
        partial = self.path.with_suffix(".partial")
        partial.write_text(f'{head[:-2]},\n "runs": [\n{lines}\n]}}\n')
        os.replace(partial, self.path)


def plain(value: Any, digits: int = 7) -> Any:
    """Rounds numbers to `digits` significant digits; those that are not finite become None."""
    if isinstance(value, dict):
        return {name: plain(item, digits) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value
