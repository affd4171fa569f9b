"""Predicts the cost of acceleration on large machines, from measurements on small ones.

It measures nothing. It reads the results of:
python -m benchmarks.cost overhead    # the library's timers on one rank and on two
python -m benchmarks.gpu              # kernels that a GPU starts, and the time of one
python -m benchmarks.launches         # kernels that the steps of either method start now
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.simulate import methods, model, predictions, words
from benchmarks.simulate.machines import Machine, read_machine
from benchmarks.simulate.sources import RANKS as COMPARED
from benchmarks.simulate.sources import Kernels, Timers, read_kernels, read_timers
from models.errors import UserError

RANKS = (6, 12, 96, 384, 1536, 6144, 27648)
MACHINES = ("summit", "frontier", "h100_pod")
GPU = report.RESULTS / "gpu-nvidia-h100-80gb-hbm3.json"
# Summit: 170 GB/s a socket, three GPUs on each; NVLink between processor and GPU.
HOST_BANDWIDTH = 57e9
HOST_LINK = 50e9
SETTINGS = {  # p, q, whether the ranks of a node share the history
    words.ROWS: (5, 5, False),
    words.NODE: (5, 5, True),
    words.DEFAULT: (2, 1, False),
}
LEGEND = """\
Streaming: bytes moved for a row, over the GPU's memory bandwidth; passes over all weights by
formula. Kernels: counted, {microseconds:.0f} us each with the Python around them ({source}). Solve:
as measured. Messages: formulas, with the figures of the machine file. No overlap is assumed.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=report.RESULTS / "simulate.json", help="default: %(default)s")
    add("--machine", nargs="+", default=list(MACHINES), help="of launch/machines, or TOML files")
    add("--ranks", type=int, nargs="+", default=list(RANKS), help="P")
    add("--parameters", type=int, help="n; default: that of --overhead")
    add("--batch", type=int, default=64, help="per GPU; default: %(default)s")
    add(
        "--images-per-second",
        type=float,
        nargs=2,
        default=[367.0, 1200.0],
        metavar=("FLOAT32", "MIXED"),
        help="training speed of a V100; default: %(default)s",
    )
    overhead = report.RESULTS / "overhead.json"
    add("--overhead", type=Path, default=overhead, help="default: %(default)s")
    add("--gpu", type=Path, default=GPU, help="default: %(default)s")
    counted = report.RESULTS / "launches.json"
    add("--launches", type=Path, default=counted, help="default: %(default)s")
    add("--kernel-microseconds", type=float, help="default: as measured in the file of --gpu")
    options = parser.parse_args(arguments)
    try:
        _check(options)
        report.prepare(options.out.parent)
        results = report.write(options.out, _results(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print(results)
    words.plot(options.out, results["machines"])
    return 0


def _check(options: argparse.Namespace) -> None:
    def require(holds: bool, name: str, value: object, allowed: str) -> None:
        if not holds:
            raise UserError(f"--{name} is {value}, must be {allowed}")

    for ranks in options.ranks:
        require(ranks >= 2, "ranks", ranks, "at least 2")
    require(options.batch >= 1, "batch", options.batch, "at least 1")
    n = options.parameters
    require(n is None or n >= 1000, "parameters", n, "at least 1000")
    rates = options.images_per_second
    require(all(0 < x < math.inf for x in rates), "images-per-second", rates, "positive")
    kernel = options.kernel_microseconds
    require(kernel is None or 0 <= kernel < math.inf, "kernel-microseconds", kernel, "at least 0")


def _results(options: argparse.Namespace) -> dict[str, Any]:
    machines = [read_machine(name) for name in options.machine]
    seconds = options.kernel_microseconds
    kernels = read_kernels(options.gpu, None if seconds is None else 1e-6 * seconds)
    timers, launches = read_timers(options.overhead), methods.read_launches(options.launches)
    n = options.parameters or timers.n
    rates = dict(zip(("float32", "mixed"), options.images_per_second, strict=True))
    both = {
        machine.name: (
            machine,
            predictions.steps_of(machine, options.batch, rates),
            methods.costs(machine, n, (timers, kernels, launches)),
        )
        for machine in machines
    }
    return {
        "parameters": n,
        "launches": dataclasses.asdict(launches),
        "methods": {
            name: [dataclasses.asdict(one) for one in own] for name, (_, _, own) in both.items()
        },
        "methods_table": methods.methods_table(both),
        "verdicts": methods.verdicts(both),
        "timers": dataclasses.asdict(timers),
        "kernels": dataclasses.asdict(kernels),
        "assumed": {
            "host_bytes_per_s_of_a_rank": HOST_BANDWIDTH,
            "host_link_bytes_per_s": HOST_LINK,
            "images_per_second_of_a_v100": rates,
            "batch": options.batch,
        },
        "machines": {
            machine.name: _predict(machine, options, n, timers, kernels, rates)
            for machine in machines
        },
    }


def _predict(
    machine: Machine,
    options: argparse.Namespace,
    n: int,
    timers: Timers,
    kernels: Kernels,
    rates: dict[str, float],
) -> dict[str, Any]:
    """Returns all predictions for one machine."""
    variants = {
        name: {
            ranks: predictions.predict(machine, ranks, timers, kernels, n=n, p=p, q=q, node=node)
            for ranks in sorted(options.ranks)
        }
        for name, (p, q, node) in SETTINGS.items()
    }
    steps = predictions.steps_of(machine, options.batch, rates)
    dense = timers.dense_bytes * n / timers.n
    offload = model.offloaded(
        n, timers.m, stack_and_solve=dense, bandwidth=HOST_BANDWIDTH, link=HOST_LINK
    )
    return {
        "figures": dataclasses.asdict(machine),
        "steps": dataclasses.asdict(steps),
        "predicted": {
            name: [x.as_dict() for x in found.values()] for name, found in variants.items()
        },
        "offload": offload,
        "answers": words.answers(
            machine, variants, steps, n=n, m=timers.m, averages=timers.averages, offload=offload
        ),
    }


def _print(results: dict[str, Any]) -> None:
    timers, kernels = results["timers"], results["kernels"]
    print(
        f"n = {results['parameters']:,}, m = {timers['m']}. Measured: bytes moved for a row in an "
        f"acceleration step ({timers['source']}):\n"
    )
    print(words.measured_table(results))
    print(f"\nThe same for {COMPARED} ranks, predicted from these and measured:\n")
    print(words.validation_table(results))
    for name, found in results["machines"].items():
        figures = found["figures"]
        print(f"\n## {name}: {figures['gpu']}, {figures['gpus_per_node']} a node; predicted\n")
        print(LEGEND.format(microseconds=1e6 * kernels["seconds"], source=kernels["source"]))
        print("Milliseconds of an acceleration step, p = q = 5:\n")
        print(words.parts_table(results, name))
        print(f"\nShare of a step in % (step times {found['steps']['source']}):\n")
        print(words.shares_table(results, name))
        print()
        print("\n".join(f"- {line}" for line in found["answers"]))
    print(f"\n{words.summary_table(results)}")
    print(f"\nBoth methods at {methods.AT} ranks, as they start kernels now:\n")
    print(results["methods_table"])
    print("\n" + "\n".join(f"- {line}" for line in results["verdicts"]))


if __name__ == "__main__":
    sys.exit(main())
