"""Wall-clock of a step with acceleration against Horovod's own, on real ranks: `--help`.

Both train the same model in one process, turn and turn about in blocks of steps, so that whatever
else the machine does meets both alike. What is printed are medians over blocks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.errors import UserError

PROBLEM = "digits_resnet-full"
FREQUENCIES = (5, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description=__doc__)
    parser.add_argument("--problem", default=PROBLEM, help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--blocks", type=int, default=10, help="of each; default: %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="in a block; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step_time.json"))
    parser.add_argument("--on-rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.on_rank:
        _measure(options)
        return 0
    try:
        return _launch(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _launch(options: argparse.Namespace) -> int:
    from benchmarks.launch import run_on_ranks
    from models.problems import PROBLEMS

    if options.problem not in PROBLEMS or options.problem == "admissions":
        names = ", ".join(name for name in PROBLEMS if name != "admissions")
        raise UserError(f"no problem named {options.problem!r}: choose from {names}")
    for name in ("ranks", "blocks", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}, must be at least 1")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    words = [f"--{name}={getattr(options, name)}" for name in ("problem", "ranks", "blocks")]
    words += [f"--steps={options.steps}", f"--out={options.out.resolve()}", "--on-rank"]
    return run_on_ranks(
        "benchmarks.step_time", *words, ranks=options.ranks, cycle_time=None, output=sys.stdout
    )


def _measure(options: argparse.Namespace) -> None:
    import horovod.torch as hvd

    from aadl_hvd import AndersonConfig, DistributedAndersonOptimizer
    from benchmarks.launch import describe_machine
    from models import dist
    from models.problems import build

    dist.start()
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
    if hvd.rank() == 0:
        _report(options, times, {k: v[1] for k, v in runs.items()}, describe_machine())
    hvd.shutdown()


def _report(
    options: argparse.Namespace,
    times: dict[str, list[float]],
    optimizers: dict[str, Any],
    machine: dict[str, Any],
) -> None:
    own = times["Horovod's own"]
    rows: dict[str, dict[str, Any]] = {}
    print(f"{options.problem}, {options.ranks} ranks, {options.blocks} blocks of {options.steps}")
    for name, found in times.items():
        ratios = [a / b for a, b in zip(found, own, strict=True)]
        quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows[name] = {
            "ms_per_step": 1000 * statistics.median(found),
            "ratio": statistics.median(ratios),
            "quartiles_of_ratio": [quarters[0], quarters[-1]],
        }
        stats = getattr(optimizers[name], "anderson", None)
        if stats is not None:
            rows[name]["accelerated"] = stats.stats.accelerated
            rows[name]["steps"] = stats.stats.steps
        print(
            f"{name:>14}  {rows[name]['ms_per_step']:8.2f} ms  {rows[name]['ratio']:6.3f}x  "
            f"(quartiles {quarters[0]:.3f} to {quarters[-1]:.3f})"
        )
    result = {
        "problem": options.problem,
        "ranks": options.ranks,
        "date": str(datetime.date.today()),
        "machine": machine,
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
