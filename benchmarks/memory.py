"""What Anderson acceleration takes in memory, at its peak, on real ranks: `--help`.

Each variant trains for a few events in processes of its own, whose peak resident memory is compared
with that of `hvd.DistributedOptimizer` alone and with the formula for the history, 2 m n/P numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from models.errors import UserError

OUT = report.RESULTS / "memory.json"
OWN = "Horovod's own"
DENSE = "dense reference (as AADL)"
VARIANTS: dict[str, dict[str, Any]] = {
    "rows": {"averages": (), "noise_gate": None},
    "rows, gate and averages": {},
    "rows, bfloat16": {"averages": (), "noise_gate": None, "history_dtype": "bfloat16"},
    "columns": {"averages": (), "noise_gate": None, "layout": "columns"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument(
        "--parameters", default="resnet18", metavar="NETWORK|N", help="default: %(default)s"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    parser.add_argument("--depth", type=int, default=20, help="m; default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    parser.add_argument("--on-rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
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
    from benchmarks.workload import shapes_of

    n = sum(shape.numel() for shape in shapes_of(options.parameters))
    for name, values in (("ranks", options.ranks), ("depth", [options.depth])):
        for value in values:
            if value < 1:
                raise UserError(f"--{name} is {value}, must be at least 1")
    runs: list[dict[str, Any]] = []
    for ranks in options.ranks:
        peaks: dict[str, int] = {}
        names = [OWN, *VARIANTS, *([DENSE] if ranks == 1 else [])]
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                found = Path(folder) / "found.json"
                words = [f"--parameters={options.parameters}", f"--depth={options.depth}"]
                words += [f"--variant={name}", f"--on-rank={found}"]
                code = run_on_ranks(
                    "benchmarks.memory", *words, ranks=ranks, cycle_time=None, output=sys.stdout
                )
                if code != 0:
                    return code
                peaks[name] = json.loads(found.read_text())
            if name != OWN:
                extra, formula = peaks[name] - peaks[OWN], 8 * options.depth * n / ranks
                runs.append(
                    {"ranks": ranks, "variant": name, "extra_bytes": extra, "formula": formula}
                )
    rows = [
        [
            f"{run['ranks']} ranks, {run['variant']}",
            f"{run['extra_bytes'] / 2**20:.0f}",
            f"{run['formula'] / 2**20:.0f}",
            f"{run['extra_bytes'] / run['formula']:.2f}",
        ]
        for run in runs
    ]
    print(f"\n{options.parameters}, n = {n:,}, m = {options.depth}; MiB at most on a rank\n")
    print(report.table(["", "peak beyond Horovod's own", "2 m n/P", "ratio"], rows))
    report.write(options.out, {"n": n, "m": options.depth, "runs": runs})
    return 0


def _measure(options: argparse.Namespace) -> None:
    """Runs on every rank; rank 0 writes the largest peak in bytes."""
    import resource

    import horovod.torch as hvd
    import torch

    from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer
    from benchmarks.convergence.aadl import extrapolate
    from benchmarks.workload import Workload, shapes_of
    from models import dist

    dist.start()
    workload = Workload(shapes_of(options.parameters))
    optimizer: Any = torch.optim.SGD(workload.parameters, lr=0.5, momentum=0.5, foreach=True)
    named = workload.named("w")
    if options.variant in VARIANTS:
        config = AndersonConfig(
            history_depth=options.depth,
            frequency=5,
            store_every=5,
            safeguard="none",
            **VARIANTS[options.variant],
        )
        optimizer = DistributedAndersonOptimizer(optimizer, named, anderson=config)
    else:
        optimizer = hvd.DistributedOptimizer(optimizer, named)
    for _ in range(5 * (options.depth + 3)):
        workload.backward()
        optimizer.step()
    if options.variant == DENSE:
        columns = [torch.randn(workload.n) for _ in range(options.depth + 2)]
        extrapolate(torch.stack(columns, dim=1), 1.0)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks = hvd.allgather(torch.tensor([peak]), name="peaks")
    if hvd.rank() == 0:
        options.on_rank.write_text(json.dumps(int(peaks.max())))
    hvd.shutdown()


if __name__ == "__main__":
    sys.exit(main())
