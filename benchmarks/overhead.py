"""What Anderson acceleration costs per step, by part, on real ranks: `--help`.

Every variant makes the same steps on parameters of ResNet50's shapes, with gradients that cost
next to nothing. Compared with `hvd.DistributedOptimizer` alone in the same program, turn and turn
about; with a dense reference that does what the published code does (all n x m numbers on every
rank, QR or normal equations); and with the floor: the 2 m n/P numbers of the history, read once at
the copy bandwidth of this machine, measured in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command, report
from benchmarks.workload import EVENT_PARTS, Workload, copy_bandwidth, shapes_of

OWN = "Horovod's own"
# Of an event, what only an attempt to accelerate needs: pairs are read and stored without one, too.
ATTEMPT_PARTS = ("gram", "solve", "update", "gather", "write")
OUT = report.RESULTS / "overhead.json"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to accelerate: p = q, and what is kept beside."""

    name: str
    frequency: int
    options: dict[str, Any]
    falling: bool = False  # a lower learning rate in every step: then updates read R, too


def variants(depth: int, ranks: int) -> list[Variant]:
    """Those that are measured; every point is taken, so that no event is cut short."""
    # One rank would have to guess the noise, which takes no time.
    common: dict[str, Any] = {"history_depth": depth, "safeguard": "none"}
    plain = common | {"averages": (), "noise_gate": None}
    gate = {} if ranks > 1 else {"noise_gate": None}
    window = plain | {"average_window": 4, "average_threshold": 1e-30}
    return [
        Variant("p = q = 5", 5, plain),
        Variant("p = q = 5, gate and averages", 5, common | gate),
        Variant("p = q = 5, moving average", 5, window),
        Variant("p = q = 5, falling rate", 5, plain, falling=True),
        Variant("p = q = 1", 1, plain),
        Variant("p = q = 1, gate and averages", 1, common | gate),
        Variant("p = q = 1, moving average", 1, window),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("benchmarks.overhead", __doc__, OUT)
    parser.add_argument(
        "--parameters", default="resnet50", metavar="NETWORK|N", help="default: %(default)s"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--depth", type=int, default=20, help="m; default: %(default)s")
    parser.add_argument("--events", type=int, default=5, help="of each; default: %(default)s")
    parser.add_argument("--no-dense", action="store_true", help="leave out the dense reference")
    return command.run(parser.parse_args(arguments), _launch, _measure)


def _launch(options: argparse.Namespace) -> None:
    shapes_of(options.parameters)
    command.at_least(1, options, "ranks", "depth", "events")
    runs = []
    for ranks in options.ranks:
        words = [f"--parameters={options.parameters}", f"--depth={options.depth}"]
        words += [f"--events={options.events}"]
        words += ["--no-dense"] if options.no_dense or ranks > 1 else []
        runs.append(command.collect("benchmarks.overhead", *words, ranks=ranks))
        print(f"\n{_table(runs[-1])}\n", flush=True)
    report.write(options.out, {"parameters": options.parameters, "runs": runs})
    _plot(runs, options.out)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    import horovod.torch as hvd

    shapes = shapes_of(options.parameters)
    n = sum(shape.numel() for shape in shapes)
    hvd.barrier()  # all ranks copy at once
    bandwidth = copy_bandwidth(n)["median"]
    floor = 2 * options.depth * n / hvd.size() * 4 / bandwidth
    found: dict[str, Any] = {"ranks": hvd.size(), "n": n, "m": options.depth, "floor_s": floor}
    found |= {"copy_bytes_per_s": bandwidth, "variants": {}}
    for variant in variants(options.depth, hvd.size()):
        found["variants"][variant.name] = measure(variant, shapes, options.events)
        gc.collect()  # an optimizer is in cycles, and with it its history
    if not options.no_dense:
        found["dense"] = _measure_dense(n, options.depth)
    return found


def measure(variant: Variant, shapes: Any, events: int) -> dict[str, Any]:
    """Times a variant against Horovod's own optimizer, on the ranks that there are. Collective.

    Args:
        variant: what to measure.
        shapes: of the parameters.
        events: accelerated steps.

    Returns:
        Seconds of an event beyond Horovod's own step, of the attempt in it, and of each part on
        this rank; ratios; bytes.
    """
    import horovod.torch as hvd
    import torch

    from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer

    p = variant.frequency
    config = AndersonConfig(frequency=p, store_every=p, **variant.options)
    # One after the other they would meet another machine; so both take turns.
    own, accelerated = Workload(shapes), Workload(shapes)

    def sgd(workload: Workload) -> torch.optim.Optimizer:
        return torch.optim.SGD(workload.parameters, lr=0.5, momentum=0.5, foreach=True)

    plain = hvd.DistributedOptimizer(sgd(own), own.named("own"))
    optimizer = DistributedAndersonOptimizer(
        sgd(accelerated), accelerated.named("accelerated"), anderson=config
    )

    def steps(workload: Workload, optimizer: Any, count: int) -> list[float]:
        times = []
        for _ in range(count):
            workload.backward()
            hvd.barrier()
            times.append(_timed(optimizer.step))
            if variant.falling and optimizer is not plain:
                optimizer.param_groups[0]["lr"] *= 0.999
        return times

    fill = p * (config.history_depth + 2)
    steps(accelerated, optimizer, fill)
    steps(own, plain, 3)
    stats = optimizer.anderson.stats
    had = stats.accelerated
    reference: list[float] = []
    events_s, others_s, ratios = [], [], []
    parts_s: dict[str, list[float]] = {part: [] for part in EVENT_PARTS}
    for _ in range(events):
        turn = steps(own, plain, max(p, 2))
        before = dict(stats.seconds)
        mine = steps(accelerated, optimizer, p)
        for part, found in parts_s.items():
            found.append(stats.seconds[part] - before[part])
        reference += turn
        events_s.append(mine[-1])
        others_s += mine[:-1]
        ratios.append(sum(mine) / p / (sum(turn) / len(turn)))
    median = report.spread(reference)["median"]
    return {
        "p": p,
        "events": events,
        "accelerated": stats.accelerated - had,
        "own_step_s": report.spread(reference),
        "event_s": report.spread([t - median for t in events_s]),
        "attempt_s": report.spread(
            [sum(times) for times in zip(*map(parts_s.__getitem__, ATTEMPT_PARTS), strict=True)]
        ),
        "step_between_over_own": (
            report.spread([t / median for t in others_s]) if others_s else None
        ),
        "step_over_own": report.spread(ratios),
        "parts_s": {part: report.spread(found) for part, found in parts_s.items()},
        "history_bytes": optimizer.anderson.history_bytes,
    }


def _measure_dense(n: int, m: int) -> dict[str, float]:
    """The published code's way: iterates stacked to n x (m + 2), least squares on all of it."""
    import torch

    from benchmarks.convergence.aadl import extrapolate

    # Iterates of a linear map, so that differences are not all alike.
    start, rate = torch.randn(n), 1.0 - torch.rand(n)
    iterates = [start]
    for _ in range(m + 1):
        iterates.append(iterates[-1] * rate)
    found = {}
    found["stack_s"] = _timed(lambda: torch.stack(iterates, dim=1))
    stacked = torch.stack(iterates, dim=1)
    iterates.clear()
    found["qr_s"] = _timed(lambda: extrapolate(stacked, 1.0))

    def by_normal_equations() -> None:
        steps = stacked[:, 1:] - stacked[:, :-1]
        w, r, last = steps[:, :-1], steps[:, 1:] - steps[:, :-1], steps[:, -1]
        gamma = torch.linalg.lstsq(r.T @ r, r.T @ last, driver="gelsd").solution
        torch.addmv(stacked[:, -2] + last, w + r, gamma, alpha=-1.0)

    found["normal_equations_s"] = _timed(by_normal_equations)
    return found


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _table(run: dict[str, Any]) -> str:
    rows = []
    for name, found in run["variants"].items():
        event, ratio = found["event_s"]["median"], found["step_over_own"]["median"]
        between = found["step_between_over_own"]
        parts = found["parts_s"]
        rows.append(
            [
                name,
                f"{1000 * found['own_step_s']['median']:.0f}",
                f"{1000 * event:.0f}",
                f"{event / run['floor_s']:.2f}",
                f"{found['attempt_s']['median'] / run['floor_s']:.2f}",
                f"{ratio:.3f}",
                f"{between['median']:.3f}" if between else "-",
                *(f"{1000 * parts[part]['median']:.1f}" for part in EVENT_PARTS),
            ]
        )
    head = ["", OWN, "event", "over floor", "attempt over floor", "step over own", "between"]
    head += EVENT_PARTS
    text = [
        f"{run['ranks']} ranks, n = {run['n']:,}, m = {run['m']}; ms; floor of an event "
        f"{1000 * run['floor_s']:.0f} ms (copying {run['copy_bytes_per_s'] / 1e9:.1f} GB/s a rank)",
        "",
        report.table(head, rows),
    ]
    if "dense" in run:
        bare, dense = run["variants"]["p = q = 5"], run["dense"]
        event, attempt = bare["event_s"]["median"], bare["attempt_s"]["median"]
        text += ["", "Dense reference on one rank, over the event with p = q = 5:"]
        for name, seconds in (
            ("QR", dense["stack_s"] + dense["qr_s"]),
            ("normal equations", dense["stack_s"] + dense["normal_equations_s"]),
        ):
            text.append(
                f"{name} {seconds:.2f} s, {seconds / event:.1f} times as long; as the attempt in "
                f"it, {seconds / attempt:.1f} times"
            )
    return "\n".join(text)


def _plot(runs: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(runs), 4.5), layout="constrained")
    panels = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    for axes, run in zip(panels, runs, strict=True):
        names = list(run["variants"])
        bottom = [0.0] * len(names)
        for part in EVENT_PARTS:
            heights = [1e3 * run["variants"][name]["parts_s"][part]["median"] for name in names]
            axes.bar(names, heights, bottom=bottom, label=part)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        axes.axhline(1000 * run["floor_s"], color="black", linestyle="--", label="floor")
        axes.set(title=f"{run['ranks']} rank{'s' * (run['ranks'] > 1)}")
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    panels[0].set_ylabel("ms per event and the stores before it")
    figure.legend(
        *panels[0].get_legend_handles_labels(), fontsize="small", loc="outside right upper"
    )
    report.save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
