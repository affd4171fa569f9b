"""Time of the tiny reduction, through mpi4py and through Horovod, on real ranks: `--help`.

MPI's own Allreduce is timed beside them, called as mpi4py's users do. If a rank has left, or is in
another operation, it waits as for a rank that is late.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command, report

# 255 and 440 numbers are about what m = 15 and m = 20 columns send in an acceleration step.
SIZES = (1, 255, 440)
RANKS = (2, 4, 8)
WARM_UP = 10
OUT = report.RESULTS / "latency.json"
BARE = "MPI_Allreduce"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("benchmarks.latency", __doc__, OUT)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=list(SIZES), help="float64 numbers in a message"
    )
    parser.add_argument("--repeats", type=int, default=200, help="default: %(default)s")
    return command.run(parser.parse_args(arguments), _launch, _measure)


def times(operation: Callable[[], Any], repeats: int, barrier: Callable[[], Any]) -> list[float]:
    """Seconds of each of `repeats` calls on this rank, all ranks entering together.

    Args:
        operation: the collective to time.
        repeats: number of calls, the same on every rank.
        barrier: collective; without it a rank that left the last call early would wait in the next.
    """
    found = []
    for _ in range(WARM_UP + repeats):
        barrier()
        started = time.perf_counter()
        operation()
        found.append(time.perf_counter() - started)
    return found[WARM_UP:]


def _launch(options: argparse.Namespace) -> None:
    command.at_least(2, options, "ranks")
    command.at_least(1, options, "sizes", "repeats")
    words = ["--sizes", *map(str, options.sizes), f"--repeats={options.repeats}"]
    cores = len(os.sched_getaffinity(0))
    runs: list[dict[str, Any]] = []
    for ranks in options.ranks:
        found = command.collect("benchmarks.latency", *words, ranks=ranks)
        runs += [{"ranks": ranks, "ranks_share_cores": ranks > cores, **run} for run in found]
    head = ["ranks", "numbers", "through", "median / us", "quartiles / us"]
    rows = [
        [
            f"{run['ranks']}{' (share cores)' if run['ranks_share_cores'] else ''}",
            str(run["numbers"]),
            run["through"],
            f"{run['microseconds']['median']:.1f}",
            f"{run['microseconds']['first_quartile']:.1f} to "
            f"{run['microseconds']['third_quartile']:.1f}",
        ]
        for run in runs
    ]
    print(f"\nAllreduce (sum) of float64 on {cores} cores, time on rank 0, measured:\n")
    print(report.table(head, rows))
    report.write(options.out, {"repeats": options.repeats, "runs": runs})
    _plot(runs, options.out)


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    import horovod.torch as hvd
    import numpy as np

    from aadl_hvd.comm.horovod import HorovodCommunicator, horovod_communicator

    comm = horovod_communicator(hvd.global_process_set)
    operations: dict[str, Callable[[Any], Any]]
    operations = {"Horovod": HorovodCommunicator(hvd.global_process_set).allreduce}
    if isinstance(comm, HorovodCommunicator) and comm.host is not None:
        from mpi4py import MPI

        world = MPI.COMM_WORLD.Dup()

        def bare(values: Any) -> Any:
            result = np.empty_like(values)
            world.Allreduce(values, result)
            return result

        operations = {"mpi4py": comm.allreduce, BARE: bare, **operations}
    found = []
    for through, operation in operations.items():
        for numbers in options.sizes:
            values = np.full(numbers, 0.5)
            seconds = times(
                lambda operation=operation, values=values: operation(values),  # type: ignore[misc]
                options.repeats,
                # The lightest barrier: another tiny reduction, of the same kind.
                lambda: comm.allreduce(np.zeros(1)),
            )
            microseconds = report.spread([1e6 * s for s in seconds])
            found.append({"through": through, "numbers": numbers, "microseconds": microseconds})
    return found


def _plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Time against length, one line for each way and number of ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for i, ranks in enumerate(sorted({run["ranks"] for run in runs})):
        for through, style in (("mpi4py", "o-"), (BARE, "^:"), ("Horovod", "s--")):
            chosen = [run for run in runs if (run["ranks"], run["through"]) == (ranks, through)]
            if not chosen:
                continue
            spreads = [run["microseconds"] for run in chosen]
            shared = ", sharing cores" if chosen[0]["ranks_share_cores"] else ""
            axes.errorbar(
                [8 * run["numbers"] for run in chosen],
                [s["median"] for s in spreads],
                report.whiskers(spreads),
                fmt=style,
                capsize=3,
                color=f"C{i}",
                label=f"{through}, {ranks} ranks{shared}",
            )
    axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="us, median and quartiles")
    figure.legend(fontsize=7, loc="outside right upper")
    report.save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
