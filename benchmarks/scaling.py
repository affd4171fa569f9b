"""How an accelerated step scales with ranks on this machine, rows against columns: `--help`.

Strong: n stays, a rank's share falls. Weak: n grows with the ranks. Where ranks outnumber cores
they share them, and memory bandwidth is shared in any case: that is said beside the numbers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import command, report
from benchmarks.overhead import Variant, measure
from benchmarks.workload import EVENT_PARTS

OUT = report.RESULTS / "scaling.json"
LAYOUTS = ("rows", "columns")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("benchmarks.scaling", __doc__, OUT)
    parser.add_argument(
        "--numbers", type=int, default=8_000_000, help="n, strong; default: %(default)s"
    )
    parser.add_argument(
        "--share", type=int, default=2_000_000, help="n/P, weak; default: %(default)s"
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8"
    )
    parser.add_argument("--depth", type=int, default=20, help="m; default: %(default)s")
    parser.add_argument("--events", type=int, default=5, help="of each; default: %(default)s")
    return command.run(parser.parse_args(arguments), _launch, _measure)


def _launch(options: argparse.Namespace) -> None:
    names = "numbers", "share", "depth", "events"
    command.at_least(1, options, "ranks", *names)
    words = [f"--{name}={getattr(options, name)}" for name in names]
    runs: list[dict[str, Any]] = []
    for ranks in options.ranks:
        runs += command.collect("benchmarks.scaling", *words, ranks=ranks)
    print(_table(runs, options.depth))
    report.write(options.out, {"m": options.depth, "runs": runs})
    _plot(runs, options.out)


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    import horovod.torch as hvd
    import torch

    runs = []
    for kind, n in (("strong", options.numbers), ("weak", options.share * hvd.size())):
        for layout in LAYOUTS:
            settings = {"averages": (), "noise_gate": None, "safeguard": "none", "layout": layout}
            variant = Variant(layout, 5, {"history_depth": options.depth, **settings})
            found = measure(variant, [torch.Size([n])], options.events)
            runs.append({"kind": kind, "layout": layout, "ranks": hvd.size(), "n": n, **found})
    return runs


def _table(runs: list[dict[str, Any]], depth: int) -> str:
    cores = len(os.sched_getaffinity(0))
    rows = []
    for kind in ("strong", "weak"):
        for layout in LAYOUTS:
            chosen = [run for run in runs if (run["kind"], run["layout"]) == (kind, layout)]
            for run in chosen:
                event = run["event_s"]["median"]
                shared = " (sharing cores)" if run["ranks"] > cores else ""
                rows.append(
                    [
                        f"{kind}, {layout}, {run['ranks']} ranks{shared}",
                        f"{run['n'] / 1e6:.1f}",
                        f"{1000 * event:.1f}",
                        f"{chosen[0]['event_s']['median'] / event:.2f}",
                        f"{run['history_bytes'] / 2**20:.0f}",
                        *(f"{1000 * run['parts_s'][part]['median']:.1f}" for part in EVENT_PARTS),
                    ]
                )
    head = ["", "n / 1e6", "event, ms", "speed-up", "MiB a rank", *EVENT_PARTS]
    return f"\nm = {depth}, p = q = 5, {cores} cores\n\n{report.table(head, rows)}"


def _plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Event against ranks; dotted: a perfect one; grey: where ranks share cores."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    cores = len(os.sched_getaffinity(0))
    for axes, kind in zip(panels, ("strong", "weak"), strict=True):
        for layout in LAYOUTS:
            chosen = [run for run in runs if (run["kind"], run["layout"]) == (kind, layout)]
            ranks = [run["ranks"] for run in chosen]
            spreads = [run["event_s"] for run in chosen]
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
    panels[0].set_ylabel("event / ms, median and quartiles")
    panels[0].legend(title="dotted: ideal; grey: sharing cores", fontsize=8, title_fontsize=8)
    report.save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
