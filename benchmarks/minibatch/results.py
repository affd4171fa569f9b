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
from benchmarks.minibatch.run import Run, least, train
from models.errors import UserError

APART = 1e-5
BASE = "base"
Key = tuple[str, str, str, float, int, int]


class Runs:
    """Makes runs and keeps them. Those without acceleration have no curve: a grid has many.

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
        self._floors: dict[str, list[float]] = {}
        self.made = 0

    def take_bases(self, path: Path) -> None:
        """Takes the runs without acceleration, and the least f, from a file that `write` wrote.

        Nothing happens if it is not there.

        Raises:
            UserError: the file holds something else.
        """
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text())
            self._floors |= content.get("floors", {})
            for run in content["runs"]:
                if run["config"] == BASE:
                    run |= {"averages": run.get("averages", {}), "curve": None}
                    for result in (run["result"], *run["averages"].values()):
                        result |= {n: math.inf for n, value in result.items() if value is None}
                    self.runs[_key(run)] = run
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} holds no results of this program: move it away") from None

    def of(
        self,
        problem: str,
        base: Base,
        seeds: int,
        config: str = BASE,
        apart: float = 0.0,
        *,
        averaged: bool = False,
    ) -> list[Run]:
        """The runs of seeds 0, 1, ..., made where they are not there yet.

        Args:
            problem: its name.
            base: the base optimizer.
            seeds: number of seeds.
            config: name of the settings.
            apart: see `Problem.make_model`.
            averaged: a run without averages, of an older file, is made again.
        """
        return [self._of(problem, base, seed, config, apart, averaged) for seed in range(seeds)]

    def _of(
        self, name: str, base: Base, seed: int, config: str, apart: float, averaged: bool
    ) -> Run:
        problem = problems.make(name, seed, self.steps)
        run: Run = {"problem": name, "base": base.name, "config": config, "apart": apart}
        run |= {"planned": problem.steps, "seed": seed}
        key = _key(run)
        if key not in self.runs or (averaged and not self.runs[key]["averages"]):
            settings = None if config == BASE else self.configs[config]
            found, _ = train(
                problem,
                base,
                settings,
                observe=self.observe,
                apart=apart,
                curve=settings is not None,
            )
            self.runs[key] = run | found
            self.made += 1
        return self.runs[key]

    def floors(self, name: str, base: Base, seeds: int, iterations: int) -> list[float] | None:
        """The least f of each seed that L-BFGS finds, from the last weights of a training.

        f belongs to the data and the network. So problems that differ by their batch share it, and
        the base of the first of them is taken.

        Args:
            name: the problem's name.
            base: the base optimizer of the training.
            seeds: number of seeds.
            iterations: see `run.least`.

        Returns:
            None if there are no iterations, or if f has no decay: then it has no minimum on
            separable data.
        """
        if not iterations or not base.coupled:
            return None
        found = self._floors.setdefault(name.rpartition("-")[0], [])
        for seed in range(len(found), seeds):
            problem = problems.make(name, seed, self.steps)
            start = train(problem, base, curve=False)[1]
            found.append(least(problem, True, [start], iterations))
        return found[:seeds]

    def write(self, path: Path, tables: Mapping[str, Any]) -> None:
        """Writes runs and tables atomically; numbers that are not finite become null.

        Raises:
            UserError: the folder cannot be written to.
        """
        report.prepare(path.parent)
        content = {
            "observe": self.observe,
            "tables": tables,
            "floors": self._floors,
            "runs": [_shortened(self.runs[key]) for key in sorted(self.runs)],
        }
        report.write(path, plain(content))


def _shortened(run: Run) -> Run:
    """Its curve with 6 digits: with all runs of a grid the file has megabytes otherwise."""
    curve = run["curve"]
    return run | {"curve": curve and [float(f"{f:.6g}") for f in curve]}


def _key(run: Run) -> Key:
    return (
        run["problem"], run["base"], run["config"], run["apart"], run["planned"], run["seed"]
    )  # fmt: skip
