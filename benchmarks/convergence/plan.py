"""Turns the command line into a plan: a list of runs for the ranks."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.errors import UserError
from models.problems import PROBLEMS

CONTENDERS = {
    "base": "hvd.DistributedOptimizer",
    "aadl": "what the published AADL code does",
    "paper": "the paper's algorithm without its moving average",
    "paper+average": "the paper's algorithm",
    "default": "DistributedAndersonOptimizer as it comes",
    "bfloat16": "the same with its history in bfloat16",
}
USUAL_CONTENDERS = ("base", "aadl", "paper", "paper+average", "default")
# Default numbers of seeds. All problems together take about 40 minutes on 2 cores.
SEEDS = {"digits_mlp": 15, "digits_resnet": 5, "admissions": 3, "burgers2d": 3, "burgers100d": 3}
OTHER_SEEDS = 20
QUICK_PROBLEMS = ("quadratic", "digits_mlp-full-sgd", "digits_mlp-100-nesterov", "burgers2d")
QUICK_STEPS, QUICK_SEEDS = 12, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Runs and what they have in common.

    Attributes:
        runs: (problem, contender, seed) in the order in which they are run.
        ranks: number of ranks.
        conditions: what must be equal for runs to be compared; written into the results.
        options: problem -> its own options, such as the path of its data.
        results: file that the runs are added to.
        cycle_time: Horovod's cycle time in ms.
    """

    runs: list[tuple[str, str, int]]
    ranks: int
    conditions: dict[str, Any]
    options: dict[str, dict[str, Any]]
    results: Path
    cycle_time: float

    def write(self, path: Path) -> None:
        """Writes the plan where the ranks read it."""
        fields = dataclasses.asdict(self) | {"results": str(self.results)}
        path.write_text(json.dumps(fields))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Reads what `write` wrote."""
        fields = json.loads(path.read_text())
        fields["runs"] = [tuple(run) for run in fields["runs"]]
        return cls(**fields | {"results": Path(fields["results"])})


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence",
        description="Trains small problems with and without Anderson acceleration on real ranks "
        "and writes what was measured: results.json, table.md, and a plot per problem.",
        epilog="problems: " + ", ".join(PROBLEMS),
    )
    add = made.add_argument
    add("--problems", nargs="+", metavar="NAME", help="problems or families, such as digits_mlp; "
        "default: all, admissions only where its data is given")  # fmt: skip
    add(
        "--contenders",
        nargs="+",
        metavar="NAME",
        default=list(USUAL_CONTENDERS),
        help=f"some of {', '.join(CONTENDERS)}; default: the first {len(USUAL_CONTENDERS)}",
    )
    fewer = ", ".join(f"{count} for {name}" for name, count in SEEDS.items())
    add("--seeds", metavar="0-19", help="a range or a list such as 0,1,5; default: "
        f"{OTHER_SEEDS} seeds, and {fewer}")  # fmt: skip
    add("--ranks", type=int, default=2, help="number of ranks, on this machine; default: 2")
    add("--out", type=Path, default=Path("benchmarks/results/convergence"),
        help="folder to write; runs that its results.json has are kept unless they are run again; "
        "default: %(default)s")  # fmt: skip
    add("--steps", type=int, help="number of steps, instead of each problem's own")
    add("--quick", action="store_true", help=f"{QUICK_STEPS} steps of a few problems with "
        f"{QUICK_SEEDS} seeds: does it run at all?")  # fmt: skip
    add("--resume", action="store_true", help="leave out runs that results.json has")
    add("--report", action="store_true", help="run nothing, write table and plots anew")
    add("--admissions-csv", type=Path, metavar="PATH", help="data of the problem admissions")
    add("--burgers2d-resample", type=int, metavar="STEPS",
        help="draw its points anew every so many steps; default: never")  # fmt: skip
    add("--burgers100d-points", type=int, metavar="N",
        help="collocation points; default: the paper's 4000")  # fmt: skip
    add("--cycle-time", type=float, default=0.2, metavar="MS",
        help="Horovod's cycle time, unless HOROVOD_CYCLE_TIME is set; default: %(default)s, since "
        "small problems wait for it in every step")  # fmt: skip
    return made


def make_plan(options: argparse.Namespace) -> Plan:
    """The plan that the command line asks for.

    Raises:
        UserError: an option has a value that is not allowed.
    """
    if options.ranks < 1:
        raise UserError(f"--ranks is {options.ranks}, must be at least 1")
    if options.steps is not None and options.steps < 1:
        raise UserError(f"--steps is {options.steps}, must be at least 1")
    if not options.cycle_time > 0:
        raise UserError(f"--cycle-time is {options.cycle_time:g}, must be greater than 0")
    problems = _problems(options)
    contenders = _contenders(options.contenders)
    steps = QUICK_STEPS if options.quick and options.steps is None else options.steps
    own: dict[str, dict[str, Any]] = {name: {} for name in problems}
    for name, chosen in own.items():
        if steps is not None:
            chosen["steps"] = steps
        if name == "admissions":
            chosen["csv"] = str(options.admissions_csv.resolve())
        if name.startswith("burgers2d") and options.burgers2d_resample is not None:
            chosen["resample"] = options.burgers2d_resample
        if name == "burgers100d" and options.burgers100d_points is not None:
            chosen["collocation"] = options.burgers100d_points
    for name, low in (("burgers2d_resample", 1), ("burgers100d_points", 10 * options.ranks)):
        value = getattr(options, name)
        if value is not None and value < low:
            text = name.replace("_", "-")
            raise UserError(f"--{text} is {value}, must be at least {low}")
    seeds = {name: _seeds(options, name) for name in problems}
    # Seed by seed, so that an interrupted call has results of every problem.
    runs = [
        (problem, contender, seed)
        for seed in sorted(set().union(*seeds.values()))
        for problem in problems
        for contender in contenders
        if seed in seeds[problem]
    ]
    conditions = {
        "ranks": options.ranks,
        "steps": steps,
        "burgers2d_resample": options.burgers2d_resample,
        "burgers100d_points": options.burgers100d_points,
    }
    return Plan(
        runs=runs,
        ranks=options.ranks,
        conditions=conditions,
        options=own,
        results=options.out.resolve() / "results.json",
        cycle_time=options.cycle_time,
    )


def family(problem: str) -> str:
    """A problem's name without its batch and optimizer."""
    return problem.split("-", 1)[0]


def parse_seeds(text: str) -> list[int]:
    """Seeds from "0-19" or "0,1,5" or both mixed.

    Raises:
        UserError: the text is something else.
    """
    seeds: list[int] = []
    try:
        for piece in text.split(","):
            first, _, last = piece.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            if not numbers:
                raise ValueError
            seeds += numbers
    except ValueError:
        raise UserError(f"--seeds is {text!r}, must be like 0-19 or 0,1,5") from None
    return sorted(set(seeds))


def _problems(options: argparse.Namespace) -> list[str]:
    has_admissions = options.admissions_csv is not None
    if has_admissions:
        from models.problems.admissions import read_admissions

        read_admissions(options.admissions_csv)
    if not options.problems:
        if options.quick:
            return list(QUICK_PROBLEMS)
        return [name for name in PROBLEMS if name != "admissions" or has_admissions]
    chosen: list[str] = []
    for wanted in _split(options.problems):
        found = [name for name in PROBLEMS if wanted in (name, family(name))]
        if not found:
            raise UserError(f"no problem named {wanted!r}: choose from {', '.join(PROBLEMS)}")
        chosen += found
    if "admissions" in chosen and not has_admissions:
        raise UserError("the problem admissions needs its data: add --admissions-csv PATH")
    return [name for name in PROBLEMS if name in chosen]


def _contenders(wanted: Sequence[str]) -> list[str]:
    chosen = _split(wanted)
    for name in chosen:
        if name not in CONTENDERS:
            raise UserError(f"no contender named {name!r}: choose from {', '.join(CONTENDERS)}")
    return [name for name in CONTENDERS if name in chosen]


def _split(words: Sequence[str]) -> list[str]:
    return [piece for word in words for piece in word.split(",") if piece]


def _seeds(options: argparse.Namespace, problem: str) -> list[int]:
    if options.seeds is not None:
        return parse_seeds(options.seeds)
    if options.quick:
        return list(range(QUICK_SEEDS))
    return list(range(SEEDS.get(family(problem), OTHER_SEEDS)))
