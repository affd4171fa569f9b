"""Tables from the written results, answers, and the plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import save, table
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
ROWS, NODE, DEFAULT = "rows", "rows in a node", "p = 2, q = 1"
AT = 1536  # ranks that the summary is for


def measured_table(results: Mapping[str, Any]) -> str:
    """Bytes moved for a row, by part."""
    timers = results["timers"]
    rows = timers["bytes_per_row"]
    cells = [f"{x:.0f}" for x in (*rows.values(), sum(rows.values()))]
    return table(
        ["", *rows, "sum", "solve / ms"], [["bytes a row", *cells, _ms(timers["solve_s"])]]
    )


def parts_table(results: Mapping[str, Any], machine: str) -> str:
    """Predicted milliseconds of an acceleration step, by part."""
    head = ["P", *GROUPS, *MESSAGES, "sum", "kernels"]
    rows = [
        [
            str(x["ranks"]),
            *(_ms(x["seconds"][name]) for name in (*GROUPS, *MESSAGES)),
            _ms(x["total"]),
            str(x["kernels"]),
        ]
        for x in results["machines"][machine]["predicted"][ROWS]
    ]
    return table(head, rows)


def shares_table(results: Mapping[str, Any], machine: str) -> str:
    """Predicted share of a training step in %, with and without noise gate and averages."""
    found = results["machines"][machine]
    steps = found["steps"]["seconds"]
    head = ["P", "every p", "MB per GPU"]
    head += [f"{name}{how}" for name in steps for how in ("", ", bare")]
    head += [f"float32, {NODE}"]
    node = {x["ranks"]: x for x in found["predicted"][NODE]}
    rows = []
    for x in (*found["predicted"][ROWS], *found["predicted"][DEFAULT]):
        row = [str(x["ranks"]), str(x["p"]), f"{x['bytes'] / 1e6:.1f}"]
        for step in steps.values():
            row += [_share(x, step), _share(x, step, "bare")]
        same = node[x["ranks"]]
        row.append(_share(same, steps["float32"]) if same["p"] == x["p"] else "-")
        rows.append(row)
    return table(head, rows)


def summary_table(results: Mapping[str, Any]) -> str:
    """All machines at AT ranks, or at the most there are."""
    head = ["GPU", "ms an acceleration step", "% of a float32 step, p = q = 5", "bare"]
    head += ["% of a mixed one", "% of a float32 step, p = 2, q = 1", "p = q = 5, a node's groups"]
    rows = []
    for found in results["machines"].values():
        at = {kind: _at(found["predicted"][kind]) for kind in (ROWS, NODE, DEFAULT)}
        step, mixed = (found["steps"]["seconds"][name] for name in ("float32", "mixed"))
        rows.append(
            [
                found["figures"]["gpu"],
                _ms(at[ROWS]["total"]),
                _share(at[ROWS], step),
                _share(at[ROWS], step, "bare"),
                _share(at[ROWS], mixed),
                _share(at[DEFAULT], step),
                _share(at[NODE], step),
            ]
        )
    return table(head, rows)


def answers(
    machine: Machine,
    variants: Mapping[str, Mapping[int, Prediction]],
    steps: Steps,
    *,
    n: int,
    m: int,
    averages: int,
    offload: Mapping[str, float],
) -> list[str]:
    """The questions of the benchmark, answered from the predictions."""
    rows, step = variants[ROWS], steps.seconds["float32"]
    at = AT if AT in rows else max(rows)
    x, y, z = rows[at], variants[DEFAULT][at], variants[NODE][at]
    parts = sorted(x.seconds.items(), key=lambda item: -item[1])[:4]
    costs = ", ".join(f"{name} {_ms(value)}" for name, value in parts)
    shares = ", ".join(
        f"{_percent(x.share(s))} % of a {name} step ({_percent(x.share(s, bare=True))} % without "
        f"noise gate and averages)"
        for name, s in steps.seconds.items()
    )
    longest = math.ceil(x.total / (TARGET * step))
    met = "met" if x.share(step) <= TARGET else "missed"
    total = offload["transfer"] + offload["least squares"]
    last = max(rows)
    worst = max(rows[last].seconds, key=lambda name: rows[last].seconds[name])
    two_level = Network(machine, last).allgather_two_level(4.0 * n)
    return [
        f"At {at} GPUs, p = q = {x.p}: {_ms(x.total)} ms an acceleration step; {shares}. Largest "
        f"parts, ms: {costs}. At most {100 * TARGET:g} % of a float32 step: {met}; "
        f"p = q = {longest} would do.",
        f"With the history shared by the ranks of a node: {_percent(z.share(step))} %, for "
        f"{z.bytes / 1e6:.0f} MB a GPU in place of {x.bytes / 1e6:.1f} MB.",
        f"{x.in_backward} of the {x.kernels} kernels are started in backward passes, where a host "
        "that is ahead of the GPU hides them. They are counted in full.",
        f"With p = {y.p}, q = 1: {_percent(y.share(step))} % of a float32 step, "
        f"{_percent(y.share(steps.seconds['mixed']))} % of a mixed one.",
        f"AADL with its history on the host: {total:.2f} s an acceleration step, so that a step "
        f"takes {1 + total / (x.p * step):.1f} times as long at p = {x.p}, "
        f"{1 + total / step:.0f} times at p = 1, at any P; the paper says 10 at 1,536 V100s.",
        f"Beyond: at {last} ranks {_percent(rows[last].share(step))} %, most of it "
        f"{worst} ({_ms(rows[last].seconds[worst])} ms). The latency of the ring "
        f"outgrows its bytes from P = {latency_break_even(machine, n)} on; an allgather in two "
        f"levels would take {_ms(two_level)} ms there. Memory: history and averages take a tenth "
        f"of a GPU's from P = {memory_break_even(machine, n, m, averages, 0.1)} on, and fit "
        f"into it at all from P = {memory_break_even(machine, n, m, averages, 1.0)} on.",
    ]


def validation_table(results: Mapping[str, Any]) -> str:
    """Predicted beside measured milliseconds of a rank's own work, on real ranks."""
    found = results["timers"]
    predicted, measured = found["predicted"], found["measured"]
    rows = [
        [part, _ms(predicted[part]), _ms(measured[part]), _ratio(predicted[part], measured[part])]
        for part in predicted
    ]
    total = sum(predicted.values()), sum(measured.values())
    rows.append(["sum", _ms(total[0]), _ms(total[1]), _ratio(*total)])
    return table(["part", "predicted / ms", "measured / ms", "predicted / measured"], rows)


def plot(path: Path, machines: Mapping[str, Mapping[str, Any]]) -> None:
    """Share of a float32 step against P, both logarithmic, one panel a machine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(machines), 3.8), layout="constrained")
    axes = figure.subplots(1, len(machines), sharey=True, squeeze=False)[0]
    for ax, (name, found) in zip(axes, machines.items(), strict=True):
        step = found["steps"]["seconds"]["float32"]
        for variant, key, style, label in (
            (ROWS, "total", "o-", ROWS),
            (NODE, "total", "o--", NODE),
            (ROWS, "bare", "o:", "rows, no gate, no averages"),
        ):
            xs = found["predicted"][variant]
            y = [100 * x[key] / (x["p"] * step) for x in xs]
            ax.loglog([x["ranks"] for x in xs], y, style, markersize=3, label=label)
        ax.axhline(100 * TARGET, color="grey", linewidth=0.8)
        ax.set(xlabel="P, ranks", title=f"{name} (predicted)")
        ax.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("acceleration / % of a float32 step")
    axes[0].legend(fontsize=7)
    save(figure, path)


def _at(predictions: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next((x for x in predictions if x["ranks"] == AT), predictions[-1])


def _share(x: Mapping[str, Any], step: float, key: str = "total") -> str:
    return _percent(x[key] / (x["p"] * step))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1.0 else f"{1e3 * seconds:.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}" if share < 1.0 else f"{100 * share:.0f}"


def _ratio(predicted: float, measured: float) -> str:
    return f"{predicted / measured:.2f}" if measured else "-"
