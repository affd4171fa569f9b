"""The sweep `step-time`: a whole training step with default settings against Horovod's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from aadl_hvd import AndersonConfig
from benchmarks import command, report
from benchmarks.cost.measure import Setting, Training, measure, through_horovod
from models.errors import UserError

PROBLEM = "digits_resnet-full"
STEPS = 10  # of a turn
FREQUENCIES = (5, 2)
RANKS = (2,)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this sweep."""
    parser.add_argument("--problem", default=PROBLEM, help="default: %(default)s")
    parser.add_argument(
        "--turns", type=int, default=10, help=f"of {STEPS} steps, of each; default: %(default)s"
    )


def check(options: argparse.Namespace) -> None:
    """Raises UserError if an option is wrong."""
    from models.problems import PROBLEMS

    if options.problem not in PROBLEMS or options.problem == "admissions":
        names = ", ".join(name for name in PROBLEMS if name != "admissions")
        raise UserError(f"--problem is {options.problem!r}, must be one of {names}")
    command.at_least(1, options, "turns")


def words(options: argparse.Namespace, ranks: int) -> list[str]:
    """The command line of one run."""
    return [f"--{name}={getattr(options, name)}" for name in ("problem", "turns")]


def measure_on_ranks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures default settings with each p. Collective."""
    import horovod.torch as hvd

    rank, ranks = hvd.rank(), hvd.size()
    runs = []
    for p in FREQUENCIES:
        setting = Setting(f"p = {p}", AndersonConfig(frequency=p), cycles=STEPS // p)
        found = measure(
            setting,
            lambda: Training(options.problem, rank, ranks),
            options.turns,
            through_horovod(),
        )
        runs.append({"problem": options.problem, "ranks": ranks, **found})
    return runs


def table(results: dict[str, Any]) -> str:
    """Milliseconds and ratios, a row for each p."""
    rows = []
    for run in results["runs"]:
        ratio = run["step_over_own"]
        rows.append(
            [
                f"{run['problem']}, {run['ranks']} ranks, {run['name']}",
                f"{1000 * run['own_step_s']['median']:.1f}",
                f"{ratio['median']:.2f}",
                f"{ratio['first_quartile']:.2f} to {ratio['third_quartile']:.2f}",
                f"{run['accelerated']} of {run['cycles']}",
            ]
        )
    return report.table(["", "own step / ms", "step over own", "quartiles", "accelerated"], rows)


def notes(results: dict[str, Any]) -> str:
    """The settings of all runs."""
    return f"Default settings but for p; medians over turns of {STEPS} steps"


def plot(results: dict[str, Any], path: Path) -> None:
    """Plots a step's time over Horovod's own, median and quartiles over turns."""
    from matplotlib.figure import Figure

    runs = results["runs"]
    figure = Figure(figsize=(4.5, 3.5), layout="constrained")
    axes = figure.subplots()
    spreads = [run["step_over_own"] for run in runs]
    places = range(len(runs))
    axes.errorbar(
        places, [s["median"] for s in spreads], report.whiskers(spreads), fmt="o", capsize=4
    )
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xticks(places, [f"{run['ranks']} ranks, {run['name']}" for run in runs])
    axes.set(ylabel="a step over Horovod's own", title=runs[0]["problem"])
    axes.set_xlim(-0.5, len(runs) - 0.5)
    report.save(figure, path)
