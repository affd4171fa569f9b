"""What a rank does by itself, measured here: bytes that each part moves for a row of the history.

One process accelerates as many numbers as a rank of P holds rows. The library's public timers say
what each part took. Two sizes give the slope, and a copy measured beside them turns it into bytes,
so that it holds on a machine with another bandwidth. Kernels are those that `benchmarks.gpu`
counted on a GPU, with the time that one took there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from aadl_hvd import AndersonConfig
from benchmarks.cost.measure import Quadratic, Setting, in_one_process, measure, seconds_of
from benchmarks.report import spread
from benchmarks.simulate.model import ROW_PARTS
from benchmarks.workload import copy_bandwidth
from models.errors import UserError

LARGE, SMALL = 6, 24  # P of the two sizes
SAMPLE_OF_N = 20  # AADL's least squares are measured on every 20th row
HOST_BOUND = 96  # P from which a GPU's streaming takes next to no time


def moved(n: int, config: AndersonConfig, turns: int) -> dict[str, Any]:
    """Bytes moved for a row, by part, in an acceleration step and the stores before it.

    Args:
        n: number of parameters, of which LARGE and SMALL ranks hold an equal share.
        config: settings; every point must be taken.
        turns: that are timed.

    Returns:
        "bytes_per_row": read and written, by part. "solve_s": seconds of the small solve.

    Raises:
        RuntimeError: an acceleration step was rejected and did not do all of its work.
    """
    found = []
    for rows in (n // LARGE, n // SMALL):
        before = copy_bandwidth(repeats=5)["median"]
        run = measure(
            Setting("rows", config),
            functools.partial(Quadratic, [torch.Size([rows])]),
            turns,
            in_one_process(),
        )
        if run["accelerated"] != run["cycles"]:
            raise RuntimeError(f"{run['accelerated']} of {run['cycles']} steps were accelerated")
        bandwidth = (before + copy_bandwidth(repeats=5)["median"]) / 2
        found.append((rows, bandwidth, {k: v["median"] for k, v in run["parts_s"].items()}))
    (rows, bandwidth, seconds), (few, theirs, fewer) = found
    return {
        "rows": [rows, few],
        "bytes_per_row": {
            part: max(bandwidth * seconds[part] - theirs * fewer[part], 0.0) / (rows - few)
            for part in ROW_PARTS
        },
        "solve_s": seconds["solve"],
    }


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What a GPU starts for an acceleration step with p = q.

    Attributes:
        source: the file that it was read from.
        seconds: of one, with the Python around it.
        by_ranks: kernels by part, by P.
        synchronizations: of the host with the GPU.
    """

    source: str
    seconds: float
    by_ranks: dict[int, dict[str, int]]
    synchronizations: int

    def of(self, ranks: int) -> dict[str, int]:
        """By part, as counted for the largest P up to `ranks`."""
        known = sorted(self.by_ranks)
        return self.by_ranks[max((P for P in known if ranks >= P), default=known[0])]


def read_kernels(path: Path, seconds: float | None = None) -> Kernels:
    """Reads what `python -m benchmarks.gpu` wrote.

    Args:
        path: its JSON file.
        seconds: of a kernel, in place of what was measured there.

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


def least_squares(n: int, m: int, repeats: int = 5) -> dict[str, float]:
    """What AADL does on every rank, stacking m columns and solving by QR; measured.

    In bytes that could be copied in that time. Both are measured one after the other, so that
    whatever else this machine does meets both.
    """
    generator = torch.Generator().manual_seed(0)
    iterates = [torch.randn(n, generator=generator) for _ in range(m + 1)]
    r = torch.randn(n, generator=generator)

    def solve(iterates: Sequence[torch.Tensor]) -> None:
        stacked = torch.stack(list(iterates), dim=1)
        q, upper = torch.linalg.qr(stacked[:, 1:] - stacked[:, :-1])
        torch.linalg.solve_triangular(upper, (q.T @ r)[:, None], upper=True)

    return spread(
        [
            seconds_of(lambda: solve(iterates)) * copy_bandwidth(repeats=3)["median"]
            for _ in range(repeats)
        ]
    )
