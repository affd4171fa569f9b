"""Time of the tiny reduction, through mpi4py and through Horovod, on real ranks: `--help`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models.errors import UserError

# 255 and 440 numbers are about what m = 15 and m = 20 columns send with an accelerated step.
SIZES = (1, 255, 440)
RANKS = (2, 4, 8)
WARM_UP = 10


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=list(SIZES), help="float64 numbers in a message"
    )
    parser.add_argument("--repeats", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latency.json"))
    parser.add_argument("--on-rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.on_rank:
        _on_rank(options)
        return 0
    try:
        return _launch(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def times(operation: Callable[[], Any], repeats: int, barrier: Callable[[], Any]) -> list[float]:
    """Seconds of each of `repeats` calls on this rank, all ranks entering together.

    Args:
        operation: collective.
        repeats: the same on every rank.
        barrier: collective; without it a rank that left the last call early would wait in the next.
    """
    found = []
    for _ in range(WARM_UP + repeats):
        barrier()
        started = time.perf_counter()
        operation()
        found.append(time.perf_counter() - started)
    return found[WARM_UP:]


def _launch(options: argparse.Namespace) -> int:
    from benchmarks.launch import run_on_ranks
    from benchmarks.report import table, write

    for name, low in (("ranks", 2), ("sizes", 1)):
        for value in getattr(options, name):
            if value < low:
                raise UserError(f"--{name} has {value}, must be at least {low}")
    if options.repeats < 1:
        raise UserError(f"--repeats is {options.repeats}, must be at least 1")
    cores = len(os.sched_getaffinity(0))
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            part = Path(folder) / f"{ranks}.json"
            words = ["--sizes", *map(str, options.sizes), f"--repeats={options.repeats}"]
            words += [f"--out={part}", "--on-rank"]
            code = run_on_ranks(
                "benchmarks.latency", *words, ranks=ranks, cycle_time=None, output=sys.stdout
            )
            if code:
                return code
            found = json.loads(part.read_text())
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
    print(table(head, rows))
    write(options.out, {"repeats": options.repeats, "runs": runs})
    return 0


def _on_rank(options: argparse.Namespace) -> None:
    import horovod.torch as hvd
    import numpy as np

    from aadl_hvd.comm.horovod import HorovodCommunicator, horovod_communicator
    from benchmarks.report import spread
    from models import dist

    dist.start()
    comm = horovod_communicator(hvd.global_process_set)
    backends = {"Horovod": HorovodCommunicator(hvd.global_process_set)}
    if isinstance(comm, HorovodCommunicator) and comm.host is not None:
        backends = {"mpi4py": comm, **backends}
    found = []
    for through, backend in backends.items():
        for numbers in options.sizes:
            values = np.full(numbers, 0.5)
            seconds = times(
                lambda backend=backend, values=values: backend.allreduce(values),  # type: ignore[misc]
                options.repeats,
                # The lightest there is: another tiny reduction, of the same kind.
                lambda: comm.allreduce(np.zeros(1)),
            )
            microseconds = spread([1e6 * s for s in seconds])
            found.append({"through": through, "numbers": numbers, "microseconds": microseconds})
    if hvd.rank() == 0:
        options.out.write_text(json.dumps(found))
    hvd.shutdown()


if __name__ == "__main__":
    sys.exit(main())
