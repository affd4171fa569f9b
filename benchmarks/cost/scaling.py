"""The sweep `scaling`: an acceleration step against the number of ranks, rows and columns.

Strong: n stays, a rank's share falls. Weak: n grows with the ranks. Ranks share memory bandwidth.
If they outnumber the cores they also share cores, and the table says so.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from aadl_hvd import AndersonConfig
from benchmarks import command, report
from benchmarks.cost.measure import Quadratic, Setting, measure, through_horovod
from benchmarks.workload import CYCLE_PARTS

LAYOUTS = ("rows", "columns")
KINDS = ("strong", "weak")
RANKS = (1, 2, 4, 8)
_OPTIONS = "numbers", "share", "depth", "turns"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this sweep."""
    add = parser.add_argument
    add("--numbers", type=int, default=8_000_000, help="n, strong; default: %(default)s")
    add("--share", type=int, default=2_000_000, help="n/P, weak; default: %(default)s")
    add("--depth", type=int, default=20, help="m; default: %(default)s")
    add("--turns", type=int, default=5, help="of each optimizer; default: %(default)s")


def check(options: argparse.Namespace) -> None:
    """Raises UserError if an option is wrong."""
    command.at_least(1, options, *_OPTIONS)


def words(options: argparse.Namespace, ranks: int) -> list[str]:
    """The command line of one run."""
    return [f"--{name}={getattr(options, name)}" for name in _OPTIONS]


def measure_on_ranks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures strong and weak scaling, in both layouts. Collective."""
    import horovod.torch as hvd
    import torch

    runs = []
    for kind, n in zip(KINDS, (options.numbers, options.share * hvd.size()), strict=True):
        for layout in LAYOUTS:
            config = AndersonConfig(
                history_depth=options.depth,
                frequency=5,
                store_every=5,
                safeguard="none",
                averages=(),
                noise_gate=None,
                layout=layout,  # type: ignore[arg-type]
            )
            found = measure(
                Setting(layout, config),
                functools.partial(Quadratic, [torch.Size([n])]),
                options.turns,
                through_horovod(),
            )
            runs.append({"kind": kind, "layout": layout, "ranks": hvd.size(), "n": n, **found})
    return runs


def _chosen(results: dict[str, Any], kind: str, layout: str) -> list[dict[str, Any]]:
    runs = results["runs"]
    return [run for run in runs if (run["kind"], run["layout"]) == (kind, layout)]


def table(results: dict[str, Any]) -> str:
    """Milliseconds and speed-up, a row for each kind, layout and number of ranks."""
    cores = results["machine"]["cores"]
    rows = []
    for kind in KINDS:
        for layout in LAYOUTS:
            chosen = _chosen(results, kind, layout)
            first = chosen[0]["acceleration_step_s"]["median"]
            for run in chosen:
                step = run["acceleration_step_s"]["median"]
                shared = ", sharing cores" if run["ranks"] > cores else ""
                rows.append(
                    [
                        f"{kind}, {layout}, {run['ranks']} rank{'s' * (run['ranks'] > 1)}{shared}",
                        f"{run['n'] / 1e6:.1f}",
                        f"{1000 * step:.0f}",
                        f"{first / step:.2f}",
                        f"{run['history_bytes'] / 2**20:.0f}",
                        *(f"{1000 * run['parts_s'][part]['median']:.1f}" for part in CYCLE_PARTS),
                    ]
                )
    head = ["", "n / 1e6", "acceleration step / ms", "speed-up", "MiB a rank", *CYCLE_PARTS]
    return report.table(head, rows)


def notes(results: dict[str, Any]) -> str:
    """The settings of all runs."""
    return f"m = {results['m']}, p = q = 5, {results['machine']['cores']} cores"


def plot(results: dict[str, Any], path: Path) -> None:
    """Plots the acceleration step against ranks; dotted: ideal; grey: ranks share cores."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    cores = results["machine"]["cores"]
    for axes, kind in zip(panels, KINDS, strict=True):
        for layout in LAYOUTS:
            chosen = _chosen(results, kind, layout)
            ranks = [run["ranks"] for run in chosen]
            spreads = [run["acceleration_step_s"] for run in chosen]
            y = [1e3 * s["median"] for s in spreads]
            error = report.whiskers(spreads, 1e-3)
            drawn = axes.errorbar(ranks, y, error, marker="o", capsize=3, label=layout)
            ideal = [y[0] * (ranks[0] / k if kind == "strong" else 1.0) for k in ranks]
            axes.plot(ranks, ideal, ":", color=drawn[0].get_color())
        axes.set(xscale="log", yscale="log", xlabel="ranks", title=kind)
        axes.set_xticks(ranks, [str(k) for k in ranks])
        axes.minorticks_off()
        if max(ranks) > cores:
            axes.axvspan(cores * 1.1, max(ranks) * 1.1, color="grey", alpha=0.2)
    panels[0].set_ylabel("acceleration step / ms, median and quartiles")
    panels[0].legend(title="dotted: ideal; grey: sharing cores", fontsize=8, title_fontsize=8)
    report.save(figure, path)
