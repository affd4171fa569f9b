"""Predicts the cost of acceleration on large machines from a rank's work, measured here.

python -m benchmarks.simulate                       # everything, some minutes
python -m benchmarks.simulate --machine summit --ranks 96 1536 --no-validate
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import command, report
from models.errors import UserError

MODULE = "benchmarks.simulate"
RANKS = (6, 12, 96, 384, 1536, 6144, 27648)
MACHINES = ("summit", "frontier", "h100_pod")
GPU = report.RESULTS / "gpu-nvidia-h100-80gb-hbm3.json"
# Summit: 170 GB/s a socket, three GPUs on each; NVLink between processor and GPU.
HOST_BANDWIDTH = 57e9
HOST_LINK = 50e9
LEGEND = """\
Streaming: bytes moved for a row, measured here, over the GPU's memory bandwidth; passes over all
weights by formula. Kernels: counted, {microseconds:.0f} us each with the Python around them, as
measured on a GPU ({source}). Solve: measured here. Messages: formulas, with the figures of the
machine file. Nothing is taken to overlap.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_options(parser, report.RESULTS / "simulate.json")
    add = parser.add_argument
    add("--machine", nargs="+", default=list(MACHINES), help="of launch/machines, or TOML files")
    add("--ranks", type=int, nargs="+", default=list(RANKS), help="P")
    add("--parameters", default="resnet50", metavar="NETWORK|N", help="default: %(default)s")
    add("--history-depth", type=int, default=20, help="m; default: %(default)s")
    add("--batch", type=int, default=64, help="per GPU; default: %(default)s")
    add(
        "--images-per-second",
        type=float,
        nargs=2,
        default=[367.0, 1200.0],
        metavar=("FLOAT32", "MIXED"),
        help="of a V100; default: %(default)s",
    )
    add("--gpu", type=Path, default=GPU, help="of benchmarks.gpu; default: %(default)s")
    add("--kernel-microseconds", type=float, help="default: as measured in the file of --gpu")
    add("--turns", type=int, default=9, help="that are timed; default: %(default)s")
    add(
        "--validate",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compare with real ranks of this machine; default: where horovodrun is",
    )
    add("--validate-ranks", type=int, default=2, help="default: %(default)s")
    return command.run(parser.parse_args(arguments), _launch, _measure_on_ranks)


def _check(options: argparse.Namespace) -> None:
    def require(holds: bool, name: str, value: object, allowed: str) -> None:
        if not holds:
            raise UserError(f"--{name} is {value}, must be {allowed}")

    command.at_least(1, options, "batch", "turns")
    command.at_least(2, options, "ranks", "history-depth", "validate-ranks")
    require(all(0 < value < math.inf for value in options.images_per_second), "images-per-second",
            options.images_per_second, "positive")  # fmt: skip
    kernel = options.kernel_microseconds
    require(kernel is None or 0 <= kernel < math.inf, "kernel-microseconds", kernel, "at least 0")
    found = shutil.which("horovodrun") is not None
    found = found or Path(sys.executable).with_name("horovodrun").exists()
    if options.validate is None:
        options.validate = found
    require(found or not options.validate, "validate", True, "off: there is no horovodrun")


def _launch(options: argparse.Namespace) -> None:
    from benchmarks.simulate import words, work
    from benchmarks.simulate.machines import read_machine
    from benchmarks.workload import copy_bandwidth, shapes_of

    _check(options)
    machines = [read_machine(name) for name in options.machine]
    seconds = options.kernel_microseconds
    kernels = work.read_kernels(options.gpu, None if seconds is None else 1e-6 * seconds)
    n = sum(shape.numel() for shape in shapes_of(options.parameters))
    if n < 1000:
        raise UserError(f"--parameters is {options.parameters}, must be at least 1000")
    settings = _settings(options.history_depth)
    m, averages = options.history_depth, len(settings[words.ROWS].averages)

    load = os.getloadavg()[0]
    bandwidth = copy_bandwidth()
    found = {
        f"p = {config.frequency}, q = {config.store_every}": work.moved(n, config, options.turns)
        for config in settings.values()
    }
    squares = work.least_squares(n // work.SAMPLE_OF_N, m)["median"] * work.SAMPLE_OF_N
    rates = dict(zip(("float32", "mixed"), options.images_per_second, strict=True))
    results: dict[str, Any] = {
        "parameters": n,
        "history_depth": m,
        "averages": averages,
        "load_average": load,
        "assumed": {
            "host_bytes_per_s_of_a_rank": HOST_BANDWIDTH,
            "host_link_bytes_per_s": HOST_LINK,
            "images_per_second_of_a_v100": rates,
            "batch": options.batch,
        },
        "measured": {
            "copy_bytes_per_s": bandwidth,
            "work": found,
            "stack_and_qr_in_bytes_copied": squares,
            "kernels": dataclasses.asdict(kernels),
        },
    }
    measured = dict(zip(settings, found.values(), strict=True))
    results["machines"] = {
        machine.name: _predict(machine, options, n, settings, measured, kernels, squares, rates)
        for machine in machines
    }
    results["validation"] = None
    if options.validate:
        results["validation"] = _validate(options, n, measured[words.ROWS])
    results = report.write(options.out, results)
    _print(results)
    words.plot(options.out, results["machines"])


def _settings(m: int) -> dict[str, Any]:
    """By the variants they are for. Every point is taken; one process has no noise to measure."""
    from aadl_hvd import AndersonConfig
    from benchmarks.simulate import words

    return {
        name: AndersonConfig(
            history_depth=m, frequency=p, store_every=q, safeguard="none", noise_gate=None
        )
        for name, p, q in ((words.ROWS, 5, 5), (words.DEFAULT, 2, 1))
    }


def _predict(
    machine: Any,
    options: argparse.Namespace,
    n: int,
    settings: dict[str, Any],
    moved: dict[str, Any],
    kernels: Any,
    squares: float,
    rates: dict[str, float],
) -> dict[str, Any]:
    """Everything about one machine."""
    from benchmarks.simulate import model, predictions, words

    m = options.history_depth
    variants: dict[str, dict[int, predictions.Prediction]] = {}
    for name, like in ((words.ROWS, words.ROWS), (words.NODE, words.ROWS), (words.DEFAULT,) * 2):
        config = settings[like]
        measured = predictions.Measured(
            n=n,
            m=m,
            averages=len(config.averages),
            p=config.frequency,
            stores=config.frequency // config.store_every,
            bytes_per_row=moved[like]["bytes_per_row"],
            solve_s=moved[like]["solve_s"],
            kernels=kernels,
        )
        variants[name] = {
            ranks: predictions.predict(machine, ranks, measured, node=name == words.NODE)
            for ranks in sorted(options.ranks)
        }
    steps = predictions.steps_of(machine, options.batch, rates)
    offload = model.offloaded(
        n, m, stack_and_solve=squares, bandwidth=HOST_BANDWIDTH, link=HOST_LINK
    )
    averages = len(settings[words.ROWS].averages)
    return {
        "figures": dataclasses.asdict(machine),
        "steps": dataclasses.asdict(steps),
        "predicted": {
            name: [x.as_dict() for x in found.values()] for name, found in variants.items()
        },
        "offload": offload,
        "answers": words.answers(
            machine, variants, steps, n=n, m=m, averages=averages, offload=offload
        ),
    }


def _validate(options: argparse.Namespace, n: int, moved: dict[str, Any]) -> dict[str, Any]:
    """A rank's own work, predicted from its rows and a copy's bandwidth, beside what it took."""
    from benchmarks.simulate import model

    ranks = options.validate_ranks
    words = [f"--parameters={options.parameters}", f"--history-depth={options.history_depth}"]
    run = command.collect(MODULE, *words, f"--turns={options.turns}", ranks=ranks)
    predicted = model.streaming(
        moved["bytes_per_row"], -(-n // ranks), n, run.pop("copy_bytes_per_s")
    )
    del predicted["replicas"]  # arithmetic, on a processor
    measured = {part: run["parts_s"][part]["median"] for part in predicted}
    return {"ranks": ranks, "predicted": predicted, "measured": measured}


def _measure_on_ranks(options: argparse.Namespace) -> dict[str, Any]:
    """The setting of the predictions, on real ranks."""
    from benchmarks.cost.measure import Quadratic, Setting, measure, through_horovod
    from benchmarks.simulate import words
    from benchmarks.workload import copy_bandwidth, shapes_of

    engine, shapes = through_horovod(), shapes_of(options.parameters)
    setting = Setting(words.ROWS, _settings(options.history_depth)[words.ROWS])

    def copied() -> float:
        engine.barrier()  # all ranks copy at once
        return copy_bandwidth()["median"]

    before = copied()
    found = measure(setting, lambda: Quadratic(shapes), options.turns, engine)
    return found | {"copy_bytes_per_s": (before + copied()) / 2}


def _print(results: dict[str, Any]) -> None:
    from benchmarks.simulate import words

    measured = results["measured"]
    kernels = measured["kernels"]
    print(
        f"n = {results['parameters']:,}, m = {results['history_depth']}. Copying here: "
        f"{measured['copy_bytes_per_s']['median'] / 1e9:.1f} GB/s; load average "
        f"{results['load_average']:.1f}.\n\n"
        "Measured here: bytes moved for a row in an acceleration step.\n"
    )
    print(words.measured_table(results))
    squares = measured["stack_and_qr_in_bytes_copied"]
    print(f"\nStacking and QR as AADL does: as long as copying {squares / 1e9:.0f} GB.")
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
    if results["validation"]:
        ranks = results["validation"]["ranks"]
        print(f"\n## here: {ranks} real ranks of this machine, a rank's own work\n")
        print(words.validation_table(results))


if __name__ == "__main__":
    sys.exit(main())
