"""What Anderson acceleration takes in memory, at its peak, on real ranks: `--help`.

Each variant trains for a few events in processes of its own, whose peak resident memory is compared
with that of `hvd.DistributedOptimizer` alone and with the formula for the history, 2 m n/P numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import command, report

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
    parser = command.parser("benchmarks.memory", __doc__, OUT)
    parser.add_argument(
        "--parameters", default="resnet18", metavar="NETWORK|N", help="default: %(default)s"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    parser.add_argument("--depth", type=int, default=20, help="m; default: %(default)s")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    return command.run(parser.parse_args(arguments), _launch, _measure)


def _launch(options: argparse.Namespace) -> None:
    from benchmarks.workload import shapes_of

    n = sum(shape.numel() for shape in shapes_of(options.parameters))
    command.at_least(1, options, "ranks", "depth")
    runs: list[dict[str, Any]] = []
    for ranks in options.ranks:
        peaks: dict[str, int] = {}
        names = [OWN, *VARIANTS, *([DENSE] if ranks == 1 else [])]
        for name in names:
            words = [f"--parameters={options.parameters}", f"--depth={options.depth}"]
            words += [f"--variant={name}"]
            peaks[name] = command.collect("benchmarks.memory", *words, ranks=ranks)
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


def _measure(options: argparse.Namespace) -> int:
    """The largest peak in bytes."""
    import resource

    import horovod.torch as hvd
    import torch

    from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer
    from benchmarks.convergence.aadl import extrapolate
    from benchmarks.workload import Workload, shapes_of

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
    return int(peaks.max())


if __name__ == "__main__":
    sys.exit(main())
