"""The sources of predictions: the library's public timers, and kernels counted on a GPU.

The timers are read from the results of `benchmarks.cost overhead`, with the bandwidth of a copy
measured beside them. The kernels are read from the results of `benchmarks.gpu`.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

from benchmarks.cost import overhead
from benchmarks.simulate import model
from models.errors import UserError

HOST_BOUND = 96  # P from which a GPU's streaming takes next to no time
RANKS = 2  # of the run that predictions are compared with


@dataclasses.dataclass(frozen=True)
class Timers:
    """The work of an acceleration step with p = q on one rank that holds all rows.

    Seconds are converted to bytes by the bandwidth of a copy measured beside them. The bytes are
    the same on a machine with another bandwidth.

    Attributes:
        source: the file that it was read from.
        n: number of parameters.
        m: history depth.
        averages: number of running averages.
        bytes_per_row: bytes read and written, by part.
        solve_s: seconds of the small solve.
        dense_bytes: bytes that could be copied while a dense reference stacks and solves by QR.
        predicted: seconds by part of a rank of RANKS, from `bytes_per_row` and the bandwidth that
            these ranks had.
        measured: measured seconds of these parts.
    """

    source: str
    n: int
    m: int
    averages: int
    bytes_per_row: dict[str, float]
    solve_s: float
    dense_bytes: float
    predicted: dict[str, float]
    measured: dict[str, float]


def read_timers(path: Path) -> Timers:
    """Reads what `python -m benchmarks.cost overhead` wrote.

    Raises:
        UserError: it cannot be read, or lacks one rank, two ranks or the dense reference.
    """
    try:
        runs = json.loads(path.read_text())["runs"]
        chosen = {run["ranks"]: run for run in runs if run["name"] == overhead.AVERAGED}
        dense = next(run for run in runs if run["name"] == overhead.DENSE)
        one, two = chosen[1], chosen[RANKS]
        n, bandwidth = one["n"], one["copy_bytes_per_s"]
        seconds, theirs = (
            {part: value["median"] for part, value in run["parts_s"].items()} for run in (one, two)
        )
        rows = {part: seconds[part] * bandwidth / n for part in model.ROW_PARTS}
        predicted = model.streaming(rows, -(-n // RANKS), n, two["copy_bytes_per_s"])
        del predicted["replicas"]  # on a processor the checksum is bound by its arithmetic
        return Timers(
            source=path.name,
            n=n,
            m=one["m"],
            averages=one["averages"],
            bytes_per_row=rows,
            solve_s=seconds["solve"],
            dense_bytes=(dense["stack_s"] + dense["qr_s"]) * dense["copy_bytes_per_s"],
            predicted=predicted,
            measured={part: theirs[part] for part in predicted},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(
            f"--overhead is {path}, must be a file that `python -m benchmarks.cost overhead` "
            f"wrote, with 1 and {RANKS} ranks and the dense reference: {error}"
        ) from None


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels of an acceleration step with p = q on a GPU.

    Attributes:
        source: the file that it was read from.
        seconds: seconds of one kernel, with the Python around it.
        by_ranks: number of kernels by part, by P.
        synchronizations: number of synchronizations of the host with the GPU.
    """

    source: str
    seconds: float
    by_ranks: dict[int, dict[str, int]]
    synchronizations: int

    def of(self, ranks: int) -> dict[str, int]:
        """Kernels by part, as counted for the largest P up to `ranks`."""
        known = sorted(self.by_ranks)
        return dict(self.by_ranks[max((P for P in known if ranks >= P), default=known[0])])


def read_kernels(path: Path, seconds: float | None = None) -> Kernels:
    """Reads what `python -m benchmarks.gpu` wrote.

    Args:
        path: its JSON file.
        seconds: seconds of a kernel, in place of the measured ones.

    Raises:
        UserError: it cannot be read, or has no runs with float32 and more than one rank.
    """
    try:
        runs = json.loads(path.read_text())["parts"]
        counted = {
            run["ranks"]: run
            for run in runs
            if run["ranks"] > 1 and run["history_dtype"] == "float32"
        }
        bound = [run for run in runs if run["ranks"] >= min(HOST_BOUND, max(counted))]
        took = [
            sum(part["median"] for part in run["seconds"].values()) / sum(run["launches"].values())
            for run in bound
        ]
        return Kernels(
            source=path.name,
            seconds=statistics.median(took) if seconds is None else seconds,
            by_ranks={P: run["launches"] for P, run in counted.items()},
            synchronizations=max(sum(x["synchronizations"].values()) for x in counted.values()),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--gpu is {path}, must be a file that `python -m benchmarks.gpu` wrote, with float32 "
            f"and more than one rank: {error}"
        ) from None
