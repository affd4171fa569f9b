"""Predicts the cost of acceleration on large machines from one rank's work, measured here.

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

from models.errors import UserError

RANKS = (6, 12, 96, 384, 1536, 6144, 27648)
MACHINES = ("summit", "frontier", "h100_pod")
COLUMNS_CYCLES = 3  # each rank works on whole columns: slow, and less disturbed
SAMPLE_OF_N = 20  # AADL's least squares are measured on every 20th row
# Summit: 170 GB/s a socket, three GPUs on each; NVLink between processor and GPU.
HOST_BANDWIDTH = 57e9
HOST_LINK = 50e9
LEGEND = """\
Store to averages: streaming measured here, times the ratio of memory bandwidths, and kernels
counted here, times {launch:g} us (assumed). Solve: measured here. Messages: formulas, with figures
of the machine file. Nothing is taken to overlap.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--machine", nargs="+", default=list(MACHINES), help="of launch/machines, or TOML files"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="P")
    parser.add_argument("--parameters", type=int, help="n; default: ResNet50's 25,557,032")
    parser.add_argument("--history-depth", type=int, default=20, help="m; default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="per GPU; default: %(default)s")
    parser.add_argument(
        "--images-per-second",
        type=float,
        nargs=2,
        default=[367.0, 1200.0],
        metavar=("FLOAT32", "MIXED"),
        help="of a V100; default: %(default)s",
    )
    parser.add_argument(
        "--launch-microseconds", type=float, default=5.0, help="assumed; default: %(default)s"
    )
    parser.add_argument("--cycles", type=int, default=9, help="events timed; default: %(default)s")
    parser.add_argument(
        "--validate",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compare with real ranks of this machine; default: where horovodrun is",
    )
    parser.add_argument("--validate-ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument(
        "--validate-parameters",
        type=float,
        nargs="+",
        help="n for each of these; default: that of the prediction, and 4e6 beyond two ranks",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder")
    options = parser.parse_args(arguments)
    try:
        _check(options)
        _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(options: argparse.Namespace) -> None:
    def require(holds: bool, name: str, value: object, allowed: str) -> None:
        if not holds:
            raise UserError(f"--{name} is {value}, must be {allowed}")

    for name, low in (("history-depth", 2), ("batch", 1), ("cycles", 1)):
        value = getattr(options, name.replace("-", "_"))
        require(value >= low, name, value, f"at least {low}")
    for name, low in (("ranks", 2), ("validate-ranks", 2)):
        for value in getattr(options, name.replace("-", "_")):
            require(value >= low, name, value, f"at least {low}")
    require(options.parameters is None or options.parameters >= 1000, "parameters",
            options.parameters, "at least 1000")  # fmt: skip
    require(all(0 < value < math.inf for value in options.images_per_second), "images-per-second",
            options.images_per_second, "positive")  # fmt: skip
    require(0 <= options.launch_microseconds < math.inf, "launch-microseconds",
            options.launch_microseconds, "at least 0")  # fmt: skip
    if options.validate_parameters is None:
        options.validate_parameters = [
            options.parameters if ranks == 2 else min(options.parameters or 4e6, 4e6)
            for ranks in options.validate_ranks
        ]
    require(len(options.validate_parameters) == len(options.validate_ranks),
            "validate-parameters", options.validate_parameters,
            f"as many as --validate-ranks, {len(options.validate_ranks)}")  # fmt: skip
    for value in options.validate_parameters:
        require(
            value is None or 1000 <= value < math.inf, "validate-parameters", value, "at least 1000"
        )
    found = shutil.which("horovodrun") is not None
    found = found or Path(sys.executable).with_name("horovodrun").exists()
    if options.validate is None:
        options.validate = found
    require(found or not options.validate, "validate", True, "off: there is no horovodrun")


def _run(options: argparse.Namespace) -> None:
    from aadl_hvd import AndersonConfig
    from benchmarks import report
    from benchmarks.simulate import model, predictions, words, work
    from benchmarks.simulate.machines import read_machine
    from benchmarks.workload import copy_bandwidth, shapes_of

    machines = [read_machine(name) for name in options.machine]
    report.prepare(options.out)
    shapes = shapes_of(str(options.parameters or work.NETWORK))
    n, m = sum(shape.numel() for shape in shapes), options.history_depth
    five = AndersonConfig(history_depth=m, frequency=5, store_every=5)
    two = dataclasses.replace(five, frequency=2, store_every=1)
    averages = len(five.averages)

    load = os.getloadavg()[0]
    bandwidth = copy_bandwidth()
    print(
        f"n = {n:,}, m = {m}. Here: {bandwidth['median'] / 1e9:.1f} GB/s of copying (measured, one "
        f"process; {load:.1f} processes were running on {len(os.sched_getaffinity(0))} cores)."
    )
    sizes = sorted({*options.ranks, *(machine.gpus_per_node for machine in machines)} - {1})
    shares: dict[tuple[str, int, int], dict[str, Any]] = {}
    for config in (five, two):
        for ranks in (*sizes, work.floor_ranks(n)):
            found = work.share(shapes, config, ranks, options.cycles)
            shares["rows", config.frequency, ranks] = found
        shares["rows", config.frequency, 0] = found  # the floor
    columns = dataclasses.replace(five, layout="columns")
    for ranks in sorted({min(ranks, m) for ranks in options.ranks}):
        shares["columns", 5, ranks] = work.share(shapes, columns, ranks, COLUMNS_CYCLES)
    print(
        "\nMeasured here: ms of one rank's work for an event, alone; kernels and waits counted.\n"
    )
    listed = [found for key, found in shares.items() if key[2]]
    print(words.measured_table(listed))
    squares = work.least_squares(n // SAMPLE_OF_N, m)["median"] * SAMPLE_OF_N
    print(
        f"\nMeasured here: stacking and QR of all m columns, as AADL does, takes as long as "
        f"copying {squares / 1e9:.0f} GB: {squares / bandwidth['median']:.2f} s."
    )

    setting: dict[str, Any] = {
        "m": m,
        "averages": averages,
        "launch": options.launch_microseconds * 1e-6,
    }
    rates = dict(zip(("float32", "mixed"), options.images_per_second, strict=True))
    results: dict[str, Any] = {}
    plotted = {}
    for machine in machines:
        rows: dict[int, predictions.Prediction] = {}
        default: dict[int, predictions.Prediction] = {}
        by_columns: dict[int, predictions.Prediction] = {}
        in_node: dict[int, predictions.Prediction] = {}
        for ranks in sorted(options.ranks):
            for p, into in ((5, rows), (2, default)):
                into[ranks] = predictions.predict(
                    machine, shares["rows", p, ranks], shares["rows", p, 0], **setting
                )
            # Beyond m ranks nobody holds less than one column.
            held = shares["columns", 5, min(ranks, m)] | {"ranks": ranks}
            by_columns[ranks] = predictions.predict(machine, held, shares["rows", 5, 0], **setting)
            group = shares["rows", 5, machine.gpus_per_node]
            if ranks >= machine.gpus_per_node > 1:
                in_node[ranks] = predictions.predict_in_node(
                    machine, shares["rows", 5, ranks], group, shares["rows", 5, 0], **setting
                )
            else:
                in_node[ranks] = rows[ranks]
        variants = {"rows": rows, "rows in a node": in_node, "columns": by_columns}
        steps = predictions.steps_of(machine, options.batch, rates)
        offload = model.offloaded(
            n, m, stack_and_solve=squares, bandwidth=HOST_BANDWIDTH,
            link=HOST_LINK,
        )  # fmt: skip
        total = offload["transfer"] + offload["least squares"]
        said = words.answers(
            machine, variants, default, steps, n=n, m=m, averages=averages, offload=offload
        )
        print(f"\n## {machine.name}: {machine.gpu}, {machine.gpus_per_node} a node; predicted\n")
        print(LEGEND.format(launch=options.launch_microseconds))
        print("Milliseconds of an event, p = q = 5:\n")
        print(words.parts_table(list(rows.values())))
        print(f"\nShare of a step in % (step times {steps.source}), bare: no gate, no averages:\n")
        print(words.shares_table([*rows.values(), *default.values()], steps))
        print("\nWho holds what; share of a float32 step in %, p = q = 5:\n")
        print(words.variants_table(variants, total, 5, steps.seconds["float32"]))
        print()
        print("\n".join(f"- {line}" for line in said))
        plotted[machine.name] = variants, steps
        results[machine.name] = {
            "figures": dataclasses.asdict(machine),
            "steps": dataclasses.asdict(steps),
            "predicted": {
                name: [x.as_dict() for x in found.values()]
                for name, found in (*variants.items(), ("p = 2, q = 1", default))
            },
            "offload": offload,
            "answers": said,
        }
    validation = _validation(options, m) if options.validate else None
    everything = {
        "parameters": n,
        "history_depth": m,
        "load_average": load,
        "assumed": {
            "launch": setting["launch"],
            "synchronisation": model.SYNCHRONISATION,
            "negotiation cycle": model.CYCLE,
            "host bandwidth of a rank": HOST_BANDWIDTH,
            "host link": HOST_LINK,
            "images per second of a V100": rates,
            "batch": options.batch,
        },
        "measured": {
            "copy bandwidth": bandwidth,
            "stack and QR, in bytes copied": squares,
            "shares": listed,
        },
        "machines": results,
        "validation": validation,
    }
    report.write(options.out / "simulate.json", everything)
    words.plot(options.out / "simulate.png", plotted)


def _validation(options: argparse.Namespace, m: int) -> dict[str, Any]:
    from benchmarks.simulate import validate, words

    cores = len(os.sched_getaffinity(0))
    counts = zip(options.validate_ranks, options.validate_parameters, strict=True)
    runs = [(ranks, None if n is None else int(n)) for ranks, n in counts]
    real = {(ranks, n): validate.on_real_ranks(ranks, n, m, options.cycles) for ranks, n in runs}
    two = next((found for (ranks, _), found in real.items() if ranks == 2), None)
    if two is None:
        two = validate.on_real_ranks(2, 1000, m, 1)
    here = validate.here(two["calibration"])
    figures = here.machine
    print("\n## here: real ranks of this machine\n")
    print(
        f"Measured with 2 ranks: copying {figures.memory_bandwidth / 1e9:.1f} GB/s a rank, "
        f"gathering {figures.intranode_bandwidth / 1e9:.2f} GB/s after "
        f"{1e6 * here.negotiation:.0f} us, latency {1e6 * figures.intranode_latency:.1f} us."
    )
    rows = {}
    for (ranks, n), found in real.items():
        predicted = validate.predict(here, ranks, n, m, options.cycles)
        note = "" if ranks <= cores else f"; {ranks} ranks share {cores} cores, not in the model"
        print(
            f"\n{ranks} ranks, n = {n or 'as above'}, median of {found['events']} events{note}:\n"
        )
        print(words.validation_table(predicted, found["seconds"]))
        rows[str(ranks)] = {"parameters": n, "predicted": predicted, "measured": found["seconds"]}
    return {"here": dataclasses.asdict(here), "ranks": rows}


if __name__ == "__main__":
    sys.exit(main())
