"""All runs so far, in one JSON file; a run that is there already is not made again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aadl_hvd import AndersonConfig
from benchmarks import report
from benchmarks.convergence.results import plain
from benchmarks.minibatch import problems
from benchmarks.minibatch.bases import Base
from benchmarks.minibatch.run import Run, train
from models.errors import UserError

APART = 1e-5
BASE = "base"
Key = tuple[str, str, str, float, int, int]


class Runs:
    """Makes runs and keeps them.

    Args:
        configs: settings of the acceleration, by name; `BASE` is none of them.
        observe: see `run.train`.
        steps: steps of every run; None: the problem's own.

    Attributes:
        runs: runs by problem, base, name of the settings, distance at the start, steps and seed.
        made: number of runs that were made here.
    """

    def __init__(
        self, configs: Mapping[str, AndersonConfig], *, observe: bool = True, steps: int | None
    ) -> None:
        self.configs, self.observe, self.steps = configs, observe, steps
        self.runs: dict[Key, Run] = {}
        self.made = 0

    def take_bases(self, path: Path) -> None:
        """Takes the runs without acceleration from a file that `write` wrote, if it is there.

        Raises:
            UserError: the file holds something else.
        """
        if not path.exists():
            return
        try:
            for run in json.loads(path.read_text())["runs"]:
                if run["config"] == BASE:
                    for name, value in run["result"].items():
                        run["result"][name] = math.inf if value is None else value
                    run["curve"] = [math.inf if f is None else f for f in run["curve"]]
                    self.runs[_key(run)] = run
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} holds no results of this program: move it away") from None

    def of(
        self, problem: str, base: Base, seeds: int, config: str = BASE, apart: float = 0.0
    ) -> list[Run]:
        """The runs of seeds 0, 1, ..., made where they are not there yet."""
        return [self._of(problem, base, seed, config, apart) for seed in range(seeds)]

    def _of(self, name: str, base: Base, seed: int, config: str, apart: float) -> Run:
        problem = problems.make(name, seed, self.steps)
        run: Run = {"problem": name, "base": base.name, "config": config, "apart": apart}
        run |= {"planned": problem.steps, "seed": seed}
        key = _key(run)
        if key not in self.runs:
            settings = None if config == BASE else self.configs[config]
            found, _ = train(problem, base, settings, observe=self.observe, apart=apart)
            self.runs[key] = run | found
            self.made += 1
        return self.runs[key]

    def write(self, path: Path, tables: Mapping[str, Any]) -> None:
        """Writes runs and tables atomically; numbers that are not finite become null.

        Raises:
            UserError: the folder cannot be written to.
        """
        report.prepare(path.parent)
        content = {
            "observe": self.observe,
            "tables": tables,
            "runs": [_shortened(self.runs[key]) for key in sorted(self.runs)],
        }
        report.write(path, plain(content))


def _shortened(run: Run) -> Run:
    """Its curve with 6 digits: with all runs of a grid the file has megabytes otherwise."""
    return run | {"curve": [float(f"{f:.6g}") for f in run["curve"]]}


def _key(run: Run) -> Key:
    return (
        run["problem"], run["base"], run["config"], run["apart"], run["planned"], run["seed"]
    )  # fmt: skip
