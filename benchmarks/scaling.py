"""How an accelerated step scales with ranks on this machine, rows against columns: `--help`.

Strong: n stays, a rank's share falls. Weak: n grows with the ranks. Where ranks outnumber cores
they share them, and memory bandwidth is shared in any case: that is said beside the numbers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
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
                        *(f"{1000 * run['parts_s'][part]:.1f}" for part in EVENT_PARTS),
                    ]
                )
    head = ["", "n / 1e6", "event, ms", "speed-up", "MiB a rank", *EVENT_PARTS]
    return f"\nm = {depth}, p = q = 5, {cores} cores\n\n{report.table(head, rows)}"


if __name__ == "__main__":
    sys.exit(main())
