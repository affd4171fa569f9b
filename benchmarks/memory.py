"""What Anderson acceleration takes in memory, at its peak, on real ranks: `--help`.

Each variant trains for a few acceleration steps in processes of its own. Their peak resident memory
is compared with that of `hvd.DistributedOptimizer` alone and with the formula for the history,
2 m n/P numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
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
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    return command.run(parser.parse_args(arguments), _launch, _measure)


def _launch(options: argparse.Namespace) -> None:
    from benchmarks.workload import shapes_of

    n = sum(shape.numel() for shape in shapes_of(options.parameters))
    command.at_least(1, options, "ranks", "depth", "repeats")
    runs: list[dict[str, Any]] = []
    for ranks in options.ranks:
        names = [OWN, *VARIANTS, *([DENSE] if ranks == 1 else [])]
        words = [f"--parameters={options.parameters}", f"--depth={options.depth}"]
        peaks: dict[str, list[int]] = {name: [] for name in names}
        for _ in range(options.repeats):
            for name in names:
                more = [*words, f"--variant={name}"]
                peaks[name].append(command.collect("benchmarks.memory", *more, ranks=ranks))
        formula = 8 * options.depth * n / ranks
        for name in names[1:]:
            extra = report.spread(
                [a - b for a, b in zip(peaks[name], peaks[OWN], strict=True)],
            )
            runs.append({"ranks": ranks, "variant": name, "extra_bytes": extra, "formula": formula})
    rows = []
    for run in runs:
        extra, formula = run["extra_bytes"], run["formula"]
        low, high = extra["first_quartile"], extra["third_quartile"]
        rows.append(
            [
                f"{run['ranks']} ranks, {run['variant']}",
                f"{extra['median'] / 2**20:.0f}",
                f"{formula / 2**20:.0f}",
                f"{extra['median'] / formula:.2f}",
                f"{low / formula:.2f} to {high / formula:.2f}",
            ]
        )
    print(f"\n{options.parameters}, n = {n:,}, m = {options.depth}; MiB at most on a rank\n")
    print(report.table(["", "peak beyond Horovod's own", "2 m n/P", "ratio", "quartiles"], rows))
    found = {"n": n, "m": options.depth, "repeats": options.repeats, "runs": runs}
    report.write(options.out, found)
    _plot(runs, options.out)


def _measure(options: argparse.Namespace) -> int:
    """Returns the largest peak of resident memory over all ranks, in bytes."""
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


def _plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Peak over the formula, a group of bars for each number of ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    counts, names = sorted({run["ranks"] for run in runs}), [*VARIANTS, DENSE]
    for i, name in enumerate(names):
        for run in runs:
            if run["variant"] == name:
                place = counts.index(run["ranks"]) + (i - (len(names) - 1) / 2) / (len(names) + 1)
                error = report.whiskers([run["extra_bytes"]], run["formula"])
                height = run["extra_bytes"]["median"] / run["formula"]
                axes.bar(place, height, 1 / (len(names) + 1), yerr=error, color=f"C{i}")
        axes.bar(0, 0, color=f"C{i}", label=name)  # for the legend alone
    axes.axhline(1.0, color="black", linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(counts)), [f"{count} ranks" for count in counts])
    axes.set(ylabel="peak beyond Horovod's own over 2 m n/P numbers")
    axes.legend(fontsize=8)
    report.save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
