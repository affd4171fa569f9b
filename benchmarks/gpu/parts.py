"""One rank's parts of an acceleration step, for several P and dtypes, against the floor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from aadl_hvd import AndersonConfig
from benchmarks.gpu import one_rank
from benchmarks.report import table
from benchmarks.simulate.predictions import GROUPS as PARTS

FREQUENCY = 5  # p = q, as in the paper


def measure(
    shapes: Sequence[torch.Size],
    *,
    depth: int,
    ranks: int,
    dtype: str,
    cycles: int,
    device: torch.device,
) -> dict[str, Any]:
    """Returns the result of `one_rank.share`, with the floor of each part in seconds.

    Args:
        shapes: shapes of the parameters.
        depth: m.
        ranks: P, of which this is one; the others are simulated.
        dtype: dtype of the history.
        cycles: number of timed acceleration steps.
        device: device of the rank.
    """
    config = AndersonConfig(
        history_depth=depth,
        frequency=FREQUENCY,
        store_every=FREQUENCY,
        history_dtype=dtype,  # type: ignore[arg-type]
        # A single rank guesses the noise, which takes no time.
        noise_gate=None if ranks == 1 else AndersonConfig.noise_gate,
    )
    found = one_rank.share(shapes, config, ranks, cycles, device)
    itemsize = getattr(torch, dtype).itemsize
    sizes = floor_bytes(
        found["parameters"], found["rows"], depth, itemsize, averages=len(config.averages)
    )
    floor = {part: size / found["bandwidth"] for part, size in sizes.items()}
    return found | {
        "history_dtype": dtype,
        "formula_bytes": 2 * depth * found["rows"] * itemsize,
        "floor_s": floor,
    }


def floor_bytes(n: int, rows: int, m: int, itemsize: int, averages: int) -> dict[str, int]:
    """Bytes that each part has to read and write at least, without the noise gate's few samples.

    Args:
        n: number of parameters.
        rows: rows of this rank, n/P.
        m: columns of the history.
        itemsize: bytes of a number of the history; all others are float32.
        averages: number of exponential averages, each of w and r.
    """
    return {
        # Rows of weights and gradient, the pair before; both pairs and a column of R and Y.
        "store": rows * (4 * (2 + 2 + 2) + 2 * itemsize),
        "gram": rows * (m * itemsize + 4),
        "update": rows * (m * itemsize + 2 * 4),
        "write": 2 * 4 * n,
        "averages": rows * 4 * (2 + 2 * 2 * averages),
    }


def seconds_of(found: dict[str, Any]) -> dict[str, float]:
    """Median seconds of an acceleration step and the steps before it, by the table's parts."""
    medians = {part: value["median"] for part, value in found["seconds"].items()}
    return {name: sum(medians[part] for part in parts) for name, parts in PARTS.items()}


def parts_table(runs: Sequence[dict[str, Any]]) -> str:
    """Milliseconds by part, each beside its floor."""
    head = ["P, dtype", "rows"]
    for name in PARTS:
        head += [name, "floor"] if name in runs[0]["floor_s"] else [name]
    head += ["Gram + update over floor", "GB/s"]
    rows = []
    for run in runs:
        seconds, floor = seconds_of(run), run["floor_s"]
        cells = [f"{run['ranks']}, {run['history_dtype']}", f"{run['rows']:,}"]
        for name, value in seconds.items():
            cells += [_ms(value), _ms(floor[name])] if name in floor else [_ms(value)]
        both = (seconds["gram"] + seconds["update"]) / (floor["gram"] + floor["update"])
        rows.append([*cells, f"{both:.2f}", f"{run['bandwidth'] / 1e9:.0f}"])
    return table(head, rows)


def costs_table(runs: Sequence[dict[str, Any]]) -> str:
    """Kernels, synchronizations by step, and bytes against 2 m n/P numbers."""
    head = ["P, dtype", "kernels", "synchronizations by step, the acceleration step last"]
    head += ["2 m n/P / MB", "history and averages", "peak", "peak over 2 m n/P"]
    rows = []
    for run in runs:
        formula, peak = run["formula_bytes"], run["peak_bytes"]
        rows.append(
            [
                f"{run['ranks']}, {run['history_dtype']}",
                str(sum(run["launches"].values())),
                " ".join(map(str, run["synchronizations_by_step"])),
                f"{formula / 1e6:.1f}",
                f"{run['bytes'] / 1e6:.1f}",
                "-" if peak is None else f"{peak / 1e6:.1f}",
                "-" if peak is None else f"{peak / formula:.2f}",
            ]
        )
    return table(head, rows)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g}"
