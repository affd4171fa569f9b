"""How an accelerated step scales with ranks on this machine, rows against columns: `--help`.

Strong: n stays, a rank's share falls. Weak: n grows with the ranks. Where ranks outnumber cores
they share them, and memory bandwidth is shared in any case: that is said beside the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.overhead import PARTS, Variant, measure
from models.errors import UserError

OUT = report.RESULTS / "scaling.json"
LAYOUTS = ("rows", "columns")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
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
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    parser.add_argument("--on-rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.on_rank:
        _measure(options)
        return 0
    try:
        return _launch(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _launch(options: argparse.Namespace) -> int:
    from benchmarks.launch import run_on_ranks

    for name in ("numbers", "share", "depth", "events"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}, must be at least 1")
    if min(options.ranks) < 1:
        raise UserError(f"--ranks is {min(options.ranks)}, must be at least 1")
    runs: list[dict[str, Any]] = []
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "found.json"
            words = [f"--{name}={getattr(options, name)}" for name in ("numbers", "share")]
            words += [f"--depth={options.depth}", f"--events={options.events}"]
            code = run_on_ranks(
                "benchmarks.scaling",
                *words,
                f"--on-rank={found}",
                ranks=ranks,
                cycle_time=None,
                output=sys.stdout,
            )
            if code != 0:
                return code
            runs += json.loads(found.read_text())
    print(_table(runs, options.depth))
    report.write(options.out, {"m": options.depth, "runs": runs})
    return 0


def _measure(options: argparse.Namespace) -> None:
    """Runs on every rank; rank 0 writes what was found."""
    import horovod.torch as hvd
    import torch

    from models import dist

    dist.start()
    runs = []
    for kind, n in (("strong", options.numbers), ("weak", options.share * hvd.size())):
        for layout in LAYOUTS:
            settings = {"averages": (), "noise_gate": None, "safeguard": "none", "layout": layout}
            variant = Variant(layout, 5, {"history_depth": options.depth, **settings})
            found = measure(variant, [torch.Size([n])], options.events)
            runs.append({"kind": kind, "layout": layout, "ranks": hvd.size(), "n": n, **found})
    if hvd.rank() == 0:
        options.on_rank.write_text(json.dumps(runs))
    hvd.shutdown()


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
                        *(f"{1000 * run['parts_s'][part]:.1f}" for part in PARTS),
                    ]
                )
    head = ["", "n / 1e6", "event, ms", "speed-up", "MiB a rank", *PARTS]
    return f"\nm = {depth}, p = q = 5, {cores} cores\n\n{report.table(head, rows)}"


if __name__ == "__main__":
    sys.exit(main())
