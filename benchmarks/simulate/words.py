"""Tables, answers and the plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import table
from benchmarks.simulate.machines import Machine
from benchmarks.simulate.model import Network
from benchmarks.simulate.predictions import (
    GROUPS,
    MESSAGES,
    Prediction,
    Steps,
    latency_break_even,
    memory_break_even,
)

TARGET = 0.015  # of a float32 step, at 1,536 V100s with p = q = 5
VARIANTS = {
    "rows": "rows",
    "rows in a node": "rows in a node",
    "columns": "columns",
    "offload": "AADL, offloaded",
}


def measured_table(shares: Sequence[dict[str, Any]]) -> str:
    """What was measured here: milliseconds of an event's parts on one rank, kernels counted."""
    groups = {name: parts for name, parts in GROUPS.items() if name not in MESSAGES}
    head = ["P, layout, p, q", "rows", *groups, "MB", "kernels", "waits"]
    rows = []
    for share in shares:
        seconds = {part: value["median"] for part, value in share["seconds"].items()}
        rows.append(
            [
                f"{share['ranks']}, {share['layout']}, {share['p']}, {share['q']}",
                f"{share['rows']:,}",
                *(_ms(sum(seconds[part] for part in parts)) for parts in groups.values()),
                f"{share['bytes'] / 1e6:.1f}",
                str(sum(share["launches"].values())),
                str(sum(share["synchronisations"].values())),
            ]
        )
    return table(head, rows)


def parts_table(predictions: Sequence[Prediction]) -> str:
    """Predicted milliseconds of an event, by part."""
    head = ["P", *GROUPS, "sum", "kernels"]
    rows = [
        [str(x.ranks), *map(_ms, x.seconds.values()), _ms(x.total), str(x.launches)]
        for x in predictions
    ]
    return table(head, rows)


def shares_table(predictions: Sequence[Prediction], steps: Steps) -> str:
    """Predicted share of a training step, with and without noise gate and averages."""
    head = ["P", "every p", "MB per GPU"]
    head += [f"{name}{how}" for name in steps.seconds for how in ("", ", bare")]
    rows = []
    for x in predictions:
        row = [str(x.ranks), str(x.p), f"{x.bytes / 1e6:.1f}"]
        for step in steps.seconds.values():
            row += [_percent(x.share(step)), _percent(x.share(step, bare=True))]
        rows.append(row)
    return table(head, rows)


def variants_table(
    variants: dict[str, dict[int, Prediction]], offload: float, p: int, step: float
) -> str:
    """Predicted share of a float32 step, by who holds what."""
    ranks = sorted(variants["rows"])
    names = [name for name in VARIANTS if name in variants]
    head = ["P", *(VARIANTS[name] for name in names), VARIANTS["offload"]]
    theirs = _percent(offload / (p * step))
    rows = [
        [str(P), *(_percent(variants[name][P].share(step)) for name in names), theirs]
        for P in ranks
    ]
    return table(head, rows)


def answers(
    machine: Machine,
    variants: dict[str, dict[int, Prediction]],
    default: dict[int, Prediction],
    steps: Steps,
    *,
    n: int,
    m: int,
    averages: int,
    offload: dict[str, float],
) -> list[str]:
    """The questions of the benchmark, answered from the predictions."""
    rows, step = variants["rows"], steps.seconds["float32"]
    at = 1536 if 1536 in rows else max(rows)
    x, y = rows[at], default[at]
    parts = sorted(x.seconds.items(), key=lambda item: -item[1])[:4]
    costs = ", ".join(f"{name} {_ms(value)}" for name, value in parts)
    shares = ", ".join(
        f"{_percent(x.share(s))} % of a {name} step ({_percent(x.share(s, bare=True))} % without "
        f"noise gate and averages)"
        for name, s in steps.seconds.items()
    )
    longest = math.ceil(x.total / (TARGET * step))
    met = "met" if x.share(step) <= TARGET else "missed"
    lines = [
        f"At {at} GPUs, p = q = {x.p}: {_ms(x.total)} ms an event; {shares}. Largest parts, ms: "
        f"{costs}. At most {100 * TARGET:g} % of a float32 step: {met}; "
        f"p = q = {longest} would do.",
        f"{x.in_backward} of the {x.launches} kernels are started in backward passes, behind work "
        "that the host is ahead of: counted in full, which errs on the high side.",
        f"With p = {y.p}, q = 1: {_percent(y.share(step))} % of a float32 step, "
        f"{_percent(y.share(steps.seconds['mixed']))} % of a mixed one.",
        f"If host work took as long there as it takes here, instead of an assumed time for "
        f"each kernel and each of {x.synchronisations} waits: {_ms(x.host_time)} ms, "
        f"{_percent(x.host_time / (x.p * step))} %.",
    ]
    lines += _layouts(variants)
    total = offload["transfer"] + offload["least squares"]
    worst = total - offload["transfer"] + offload["transfer of all"]
    lines.append(
        f"AADL with its history on the host: {total:.2f} s an event ({worst:.2f} s if all m "
        f"iterates cross the link), so that a step takes {1 + total / (x.p * step):.1f} "
        f"({1 + worst / (x.p * step):.1f}) times as long at p = {x.p}, "
        f"{1 + total / step:.0f} times at p = 1, at any P; the paper says 10 at 1,536 V100s."
    )
    last = max(rows)
    worst_part = max(rows[last].seconds, key=lambda name: rows[last].seconds[name])
    two_level = Network(machine, last).allgather_two_level(4.0 * n)
    lines.append(
        f"Beyond: at {last} ranks {_percent(rows[last].share(step))} %, most of it "
        f"{worst_part} ({_ms(rows[last].seconds[worst_part])} ms). The latency of the ring "
        f"outgrows its bytes from P = {latency_break_even(machine, n)} on; an allgather in two "
        f"levels would take {_ms(two_level)} ms there. Memory: history and averages take a tenth "
        f"of a GPU's from P = {memory_break_even(machine, n, m, averages, 0.1)} on, and fit "
        f"into it at all from P = {memory_break_even(machine, n, m, averages, 1.0)} on."
    )
    return lines


def _layouts(variants: dict[str, dict[int, Prediction]]) -> list[str]:
    lines = []
    for names, what in (
        (("rows", "columns"), "Of the layouts there are"),
        (tuple(name for name in VARIANTS if name in variants), "With shards within nodes, too"),
    ):
        winners: dict[str, list[str]] = {}
        for P in sorted(variants["rows"]):
            present = [name for name in names if name in variants and P in variants[name]]
            best = min(present, key=lambda name, P=P: variants[name][P].total)  # type: ignore[misc]
            winners.setdefault(VARIANTS[best], []).append(str(P))
        found = "; ".join(f"{name} at P = {', '.join(at)}" for name, at in winners.items())
        lines.append(f"{what}, the cheapest: {found}.")
    return lines


def validation_table(predicted: dict[str, float], measured: dict[str, float]) -> str:
    """Predicted beside measured milliseconds of an event's parts on real ranks."""
    rows = [
        [part, _ms(predicted[part]), _ms(measured[part]), _ratio(predicted[part], measured[part])]
        for part in predicted
    ]
    total = sum(predicted.values()), sum(measured.values())
    rows.append(["sum", _ms(total[0]), _ms(total[1]), _ratio(*total)])
    head = ["part", "predicted / ms", "measured / ms", "predicted / measured"]
    return table(head, rows)


def plot(path: Path, machines: dict[str, tuple[dict[str, dict[int, Prediction]], Steps]]) -> None:
    """Share of a float32 step against P, both logarithmic, one panel a machine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(machines), 3.8), layout="constrained")
    axes = figure.subplots(1, len(machines), sharey=True, squeeze=False)[0]
    for ax, (name, (variants, steps)) in zip(axes, machines.items(), strict=True):
        step = steps.seconds["float32"]
        for variant, found in variants.items():
            style = "o--" if variant == "rows in a node" else "o-"
            y = [100 * x.share(step) for x in found.values()]
            ax.loglog(list(found), y, style, markersize=3, label=VARIANTS[variant])
        bare = [100 * x.share(step, bare=True) for x in variants["rows"].values()]
        ax.loglog(
            list(variants["rows"]), bare, "o:", markersize=3, label="rows, no gate, no averages"
        )
        ax.axhline(100 * TARGET, color="grey", linewidth=0.8)
        ax.set(xlabel="P, ranks", title=f"{name} (predicted)")
        ax.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("acceleration / % of a float32 step")
    axes[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1.0 else f"{1e3 * seconds:.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}" if share < 1.0 else f"{100 * share:.0f}"


def _ratio(predicted: float, measured: float) -> str:
    return f"{predicted / measured:.2f}" if measured else "-"
