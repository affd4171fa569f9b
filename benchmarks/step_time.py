"""Wall-clock of a step with acceleration against Horovod's own, on real ranks: `--help`.

Both train the same model in one process, turn and turn about in blocks of steps, so that whatever
else the machine does meets both alike. What is printed are medians over blocks.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import command, report
from models.errors import UserError

PROBLEM = "digits_resnet-full"
FREQUENCIES = (5, 2)
OUT = report.RESULTS / "step_time.json"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("benchmarks.step_time", __doc__, OUT)
    parser.add_argument("--problem", default=PROBLEM, help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--blocks", type=int, default=10, help="of each; default: %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="in a block; default: %(default)s")
    return command.run(parser.parse_args(arguments), _launch, _measure)


def _launch(options: argparse.Namespace) -> None:
    from models.problems import PROBLEMS

    if options.problem not in PROBLEMS or options.problem == "admissions":
        names = ", ".join(name for name in PROBLEMS if name != "admissions")
        raise UserError(f"no problem named {options.problem!r}: choose from {names}")
    command.at_least(1, options, "ranks", "blocks", "steps")
    words = [f"--{name}={getattr(options, name)}" for name in ("problem", "blocks", "steps")]
    found = command.collect("benchmarks.step_time", *words, ranks=options.ranks)
    rows = _compare(found["seconds"])
    for name, counters in found["counters"].items():
        rows[name] |= counters
    print(f"{options.problem}, {options.ranks} ranks, {options.blocks} blocks of {options.steps}")
    for name, row in rows.items():
        low, high = row["quartiles_of_ratio"]
        print(
            f"{name:>14}  {row['ms_per_step']:8.2f} ms  {row['ratio']:6.3f}x  "
            f"(quartiles {low:.3f} to {high:.3f})"
        )
    results = {"problem": options.problem, "ranks": options.ranks, "rows": rows}
    report.write(options.out, results)
    _plot(rows, f"{options.problem}, {options.ranks} ranks", options.out)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step of every block on this rank, and what was accelerated."""
    import horovod.torch as hvd

    from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer
    from models.problems import build

    problem = build(options.problem, rank=hvd.rank(), ranks=hvd.size())
    runs: dict[str, Any] = {}
    for name in ("Horovod's own", *(f"p = {p}" for p in FREQUENCIES)):
        model = problem.make_model()
        base = problem.make_optimizer(model)
        named = list(model.named_parameters(prefix=name))
        if name.startswith("p"):
            config = AndersonConfig(frequency=int(name.split()[-1]))
            runs[name] = model, DistributedAndersonOptimizer(base, named, anderson=config)
        else:
            runs[name] = model, hvd.DistributedOptimizer(base, named_parameters=named)

    def block(model: Any, optimizer: Any) -> float:
        hvd.barrier()
        started = time.perf_counter()
        for step in range(options.steps):
            optimizer.zero_grad()
            loss = problem.loss(model, step)
            loss.backward()
            if hasattr(optimizer, "observe"):
                optimizer.observe(loss)
            optimizer.step()
        return (time.perf_counter() - started) / options.steps

    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.blocks + 1):
        for name, (model, optimizer) in runs.items():
            seconds = block(model, optimizer)
            if number:  # the first sets everything up
                times[name].append(seconds)
    counters = {
        name: {
            "accelerated": optimizer.anderson.stats.accelerated,
            "steps": optimizer.anderson.stats.steps,
        }
        for name, (_, optimizer) in runs.items()
        if hasattr(optimizer, "anderson")
    }
    return {"seconds": times, "counters": counters}


def _compare(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    own = times["Horovod's own"]
    rows: dict[str, dict[str, Any]] = {}
    for name, found in times.items():
        ratio = report.spread([a / b for a, b in zip(found, own, strict=True)])
        rows[name] = {
            "ms_per_step": 1000 * report.spread(found)["median"],
            "ratio": ratio["median"],
            "quartiles_of_ratio": [ratio["first_quartile"], ratio["third_quartile"]],
        }
    return rows


def _plot(rows: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """A step over Horovod's own, median and quartiles over blocks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 3.5), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows.values()):
        low, high = row["quartiles_of_ratio"]
        error = [[row["ratio"] - low], [high - row["ratio"]]]
        axes.errorbar([i], [row["ratio"]], error, fmt="o", capsize=4, color="C0")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(rows)), list(rows))
    axes.set(ylabel="a step over Horovod's own", title=title, xlim=(-0.5, len(rows) - 0.5))
    report.save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
