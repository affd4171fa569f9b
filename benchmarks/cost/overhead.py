"""The sweep `overhead`: several settings, by part, against the floor.

The floor is the time to read the 2 m n/P numbers of the history once, at the copy bandwidth of the
same run. A dense reference works as the published code does: all n x m numbers on every rank, QR or
normal equations.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aadl_hvd import AndersonConfig
from benchmarks import command, report
from benchmarks.cost.measure import Quadratic, Setting, measure, seconds_of, through_horovod
from benchmarks.workload import CYCLE_PARTS, copy_bandwidth, shapes_of

DENSE = "dense reference"
AVERAGED = "p = q = 5, gate and averages"  # what benchmarks.simulate reads
RANKS = (1, 2)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this sweep."""
    add = parser.add_argument
    add("--parameters", default="resnet50", metavar="NETWORK|N", help="default: %(default)s")
    add("--depth", type=int, default=20, help="m; default: %(default)s")
    add("--turns", type=int, default=5, help="of each optimizer; default: %(default)s")
    add("--no-dense", action="store_true", help="leave out the dense reference")


def check(options: argparse.Namespace) -> None:
    """Raises UserError if an option is wrong."""
    shapes_of(options.parameters)
    command.at_least(1, options, "depth", "turns")


def words(options: argparse.Namespace, ranks: int) -> list[str]:
    """The command line of one run on that many ranks."""
    found = [f"--{name}={getattr(options, name)}" for name in ("parameters", "depth", "turns")]
    return [*found, *(["--no-dense"] if options.no_dense or ranks > 1 else [])]


def settings(depth: int, ranks: int) -> list[Setting]:
    """The settings that are measured. Every point is taken, so that no step is cut short."""
    # A single rank guesses the noise, which takes no time.
    gate: dict[str, Any] = {} if ranks > 1 else {"noise_gate": None}
    bare: dict[str, Any] = {"averages": (), "noise_gate": None}
    window = bare | {"average_window": 4, "average_threshold": 1e-30}
    found = []
    for p in (5, 1):
        for name, chosen, falling in (
            (f"p = q = {p}", bare, False),
            (f"p = q = {p}, gate and averages", gate, False),
            (f"p = q = {p}, moving average", window, False),
            (f"p = q = {p}, falling rate", bare, True),
        ):
            if p == 1 and falling:
                continue
            config = AndersonConfig(
                history_depth=depth, frequency=p, store_every=p, safeguard="none", **chosen
            )
            found.append(Setting(name, config, falling))
    # The default p and q: two columns are new in each acceleration step.
    config = AndersonConfig(
        history_depth=depth, frequency=2, store_every=1, safeguard="none", **bare
    )
    found.append(Setting("p = 2, q = 1", config))
    return found


def measure_on_ranks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures all settings, and the dense reference unless it is left out. Collective."""
    import horovod.torch as hvd

    shapes, engine = shapes_of(options.parameters), through_horovod()
    n = sum(shape.numel() for shape in shapes)
    engine.barrier()  # all ranks copy at once
    bandwidth = copy_bandwidth(n)["median"]
    about = {"ranks": hvd.size(), "n": n, "copy_bytes_per_s": bandwidth}
    about["floor_s"] = 2 * options.depth * n / hvd.size() * 4 / bandwidth
    runs = [
        about | measure(setting, lambda: Quadratic(shapes), options.turns, engine)
        for setting in settings(options.depth, hvd.size())
    ]
    if not options.no_dense:
        runs.append(about | {"name": DENSE, **_measure_dense(n, options.depth)})
    return runs


def _measure_dense(n: int, m: int) -> dict[str, float]:
    """Times stacking iterates to n x (m + 2), and least squares on all of it."""
    import torch

    from benchmarks.convergence.aadl import extrapolate

    # Iterates of a linear map, so that differences are not all alike.
    start, rate = torch.randn(n), 1.0 - torch.rand(n)
    iterates = [start]
    for _ in range(m + 1):
        iterates.append(iterates[-1] * rate)
    stack_s = seconds_of(lambda: torch.stack(iterates, dim=1))
    stacked = torch.stack(iterates, dim=1)
    iterates.clear()
    qr_s = seconds_of(lambda: extrapolate(stacked, 1.0))

    def by_normal_equations() -> None:
        steps = stacked[:, 1:] - stacked[:, :-1]
        w, r, last = steps[:, :-1], steps[:, 1:] - steps[:, :-1], steps[:, -1]
        gamma = torch.linalg.lstsq(r.T @ r, r.T @ last, driver="gelsd").solution
        torch.addmv(stacked[:, -2] + last, w + r, gamma, alpha=-1.0)

    return {
        "stack_s": stack_s,
        "qr_s": qr_s,
        "normal_equations_s": seconds_of(by_normal_equations),
    }


def table(results: dict[str, Any]) -> str:
    """Milliseconds and ratios, a row for each setting."""
    rows = []
    for run in results["runs"]:
        if run["name"] == DENSE:
            continue
        floor, between = run["floor_s"], run["between_over_own"]
        rows.append(
            [
                f"{run['ranks']}, {run['name']}",
                f"{1000 * run['own_step_s']['median']:.0f}",
                f"{1000 * run['acceleration_step_s']['median']:.0f}",
                f"{run['acceleration_step_s']['median'] / floor:.2f}",
                f"{run['gram_to_write_s']['median'] / floor:.2f}",
                f"{run['step_over_own']['median']:.2f}",
                f"{between['median']:.2f}" if between else "-",
                *(f"{1000 * run['parts_s'][part]['median']:.1f}" for part in CYCLE_PARTS),
            ]
        )
    head = ["ranks, setting", "own step", "acceleration step", "over floor"]
    head += ["Gram to write over floor", "step over own", "between", *CYCLE_PARTS]
    return report.table(head, rows)


def notes(results: dict[str, Any]) -> str:
    """The floors, and the dense reference against an acceleration step of p = q = 5."""
    runs = results["runs"]
    bare = {run["ranks"]: run for run in runs if run["name"] == "p = q = 5"}
    lines = [
        f"{ranks} rank{'s' * (ranks > 1)}: n = {run['n']:,}, m = {results['m']}; floor "
        f"{1000 * run['floor_s']:.0f} ms (copying {run['copy_bytes_per_s'] / 1e9:.1f} GB/s a rank)"
        for ranks, run in bare.items()
    ]
    for dense in (run for run in runs if run["name"] == DENSE):
        step = bare[dense["ranks"]]["acceleration_step_s"]["median"]
        alone = bare[dense["ranks"]]["gram_to_write_s"]["median"]
        for name, key in (("QR", "qr_s"), ("normal equations", "normal_equations_s")):
            seconds = dense["stack_s"] + dense[key]
            lines.append(
                f"Dense reference, {name}: {seconds:.1f} s, {seconds / step:.0f} "
                f"times the acceleration step, {seconds / alone:.0f} times Gram to write"
            )
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Parts stacked, a bar for each setting, a panel for each number of ranks."""
    from matplotlib.figure import Figure

    by_ranks: dict[int, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        if run["name"] != DENSE:
            by_ranks.setdefault(run["ranks"], []).append(run)
    figure = Figure(figsize=(5.5 * len(by_ranks), 4.5), layout="constrained")
    panels: Sequence[Any] = figure.subplots(1, len(by_ranks), squeeze=False, sharey=True)[0]
    for axes, (ranks, runs) in zip(panels, by_ranks.items(), strict=True):
        names = [run["name"] for run in runs]
        bottom = [0.0] * len(runs)
        for part in CYCLE_PARTS:
            heights = [1e3 * run["parts_s"][part]["median"] for run in runs]
            axes.bar(names, heights, bottom=bottom, label=part)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        axes.axhline(1000 * runs[0]["floor_s"], color="black", linestyle="--", label="floor")
        axes.set(title=f"{ranks} rank{'s' * (ranks > 1)}")
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    panels[0].set_ylabel("ms of an acceleration step and the stores before it")
    figure.legend(
        *panels[0].get_legend_handles_labels(), fontsize="small", loc="outside right upper"
    )
    report.save(figure, path)
