"""What Anderson acceleration costs on one GPU: `python -m benchmarks.gpu --help`.

First it times the parts of an acceleration step on one rank of P, in torch alone. The other ranks
are simulated. The floor of a part is the bytes it has to move over the copy bandwidth of the same
run. Then it times a network's training step with and without acceleration: with torch alone, with
DALI if it is installed, and through Horovod with one rank if it is built with NCCL. Times on a GPU
are taken in its stream.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import aadl_hvd.kernels as kernels
from benchmarks import command, report
from benchmarks.launch import version
from models.errors import UserError

MODULE = "benchmarks.gpu"
DEVICE = "DEVICE"  # in --out, stands for the device's name
OUT = report.RESULTS / f"gpu-{DEVICE}.json"
DTYPES = ("float32", "bfloat16")
SMALL = "--parameters=100000 --model=resnet8 --image-size=32 --batch=8 --depth=3"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser(MODULE, __doc__, OUT)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, or cpu to try it out; default: %(default)s")
    add("--parameters", default="resnet50", metavar="NETWORK|N", help="default: %(default)s")
    add("--ranks", type=int, nargs="+", default=[1, 6, 96, 1536], help="P; default: 1 6 96 1536")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    add("--depth", type=int, default=20, help="m; default: %(default)s")
    add("--cycles", type=int, default=20, help="timed cycles of p steps; default: %(default)s")
    add("--model", default="resnet50", help="network of the training step; default: %(default)s")
    add("--batch", type=int, default=64, help="images in a step; default: %(default)s")
    add("--image-size", type=int, default=224, help="pixels; default: %(default)s")
    add("--method", choices=("residual", "subspace"), default="residual",
        help="of the training steps; default: %(default)s")  # fmt: skip
    add("--no-parts", action="store_true", help="training steps alone")
    add("--no-steps", action="store_true", help="parts alone, without training steps")
    add("--torch-alone", action="store_true", help="parts alone, without Triton's kernels")
    return command.run(parser.parse_args(arguments), _launch, _on_rank)


def _launch(options: argparse.Namespace) -> None:
    device = _device(options.device)
    command.at_least(1, options, "ranks", "depth", "cycles", "batch")
    if options.image_size < 32:
        raise UserError(f"--image-size is {options.image_size}, must be at least 32")
    if version("torchvision") is None:
        raise UserError("torchvision is not installed: the networks' shapes are its own")
    from benchmarks.gpu import parts, step
    from benchmarks.workload import shapes_of

    shapes = shapes_of(options.parameters)
    step.checked(options)
    torch.backends.cudnn.benchmark = True
    found = describe(device)
    n = sum(shape.numel() for shape in shapes)
    print(f"{found['name']}, n = {n:,}, m = {options.depth}, p = q = {parts.FREQUENCY}; ms\n")
    runs = []
    triton = kernels.usable(device) and not options.torch_alone
    for ranks in () if options.no_parts else options.ranks:
        for dtype in options.dtypes:
            with mock.patch.object(kernels, "usable", lambda *_: triton):
                run = parts.measure(
                    shapes,
                    depth=options.depth,
                    ranks=ranks,
                    dtype=dtype,
                    cycles=options.cycles,
                    device=device,
                )
            runs.append(run)
    if runs:
        print(f"{parts.parts_table(runs)}\n\n{parts.costs_table(runs)}\n", flush=True)
    out = options.out.with_name(options.out.name.replace(DEVICE, _slug(found["name"])))
    step_of = {name: getattr(options, name) for name in ("model", "batch", "image_size", "method")}
    results = {
        "triton": triton,
        "device": found,
        "n": n,
        "m": options.depth,
        "step_of": step_of,
        "parts": runs,
    }
    report.write(out, results)  # now, since the training steps below may fail
    if runs:
        _plot(runs, found["name"], out.with_suffix(".png"))
    steps: dict[str, Any] = {}
    for name, run in () if options.no_steps or options.torch_alone else _steps(options, device):
        steps[name] = run
        report.write(out, results | {"steps": steps})
    if steps:
        print(f"\n{options.model}, batch {options.batch}, {options.image_size} pixels\n")
        print(step.steps_table(steps))


def _steps(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Any]]:
    """Yields names and runs; in place of a run that is not possible, the reason."""
    from benchmarks.gpu import step

    yield "torch alone", step.measure(options, device, step.synthetic(options, device), False)
    decoder = "mixed" if device.type == "cuda" else "cpu"
    name = f"torch alone, DALI's {decoder} decoder"
    try:
        with step.decoded(options, device) as batches:
            yield name, step.measure(options, device, batches, False)
    except UserError as error:
        yield name, str(error)
    name = "through Horovod, one rank"
    if lack := step.horovod_lacks(device):
        yield name, lack
    else:
        names = ("device", "depth", "cycles", "model", "batch", "image_size", "method")
        words = [f"--{word.replace('_', '-')}={getattr(options, word)}" for word in names]
        yield name, command.collect(MODULE, *words, ranks=1)


def _on_rank(options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.gpu import step

    device = _device(options.device)
    torch.backends.cudnn.benchmark = True
    return step.measure(options, device, step.synthetic(options, device), True)


def _device(name: str) -> torch.device:
    """The device asked for.

    Raises:
        UserError: the name is not known, or there is no GPU.
    """
    if name not in ("cuda", "cpu"):
        raise UserError(f"--device is {name!r}, must be cuda or cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"there is no GPU that torch {torch.__version__} can use. Run this where there is one, "
            f"or try it out with --device=cpu {SMALL}"
        )
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def describe(device: torch.device) -> dict[str, Any]:
    """The device's name, memory and software versions."""
    if device.type != "cuda":
        return {"name": "cpu", "torchvision": version("torchvision")}
    figures = torch.cuda.get_device_properties(device)
    return {
        "name": figures.name,
        "memory_gib": round(figures.total_memory / 2**30, 1),
        "multiprocessors": figures.multi_processor_count,
        "capability": f"{figures.major}.{figures.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torchvision": version("torchvision"),
    }


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _plot(runs: list[dict[str, Any]], name: str, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    from benchmarks.gpu.parts import PARTS, seconds_of

    dtypes = list(dict.fromkeys(run["history_dtype"] for run in runs))
    figure = Figure(figsize=(4.5 * len(dtypes), 4.5), layout="constrained")
    panels = figure.subplots(1, len(dtypes), squeeze=False, sharey=True)[0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        chosen = [run for run in runs if run["history_dtype"] == dtype]
        labels = [str(run["ranks"]) for run in chosen]
        bottom = [0.0] * len(chosen)
        for part in PARTS:
            heights = [1000 * seconds_of(run)[part] for run in chosen]
            axes.bar(labels, heights, bottom=bottom, label=part)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        floors = [1000 * sum(run["floor_s"].values()) for run in chosen]
        axes.plot(labels, floors, "k_", markersize=25, label="floor")
        axes.set(
            title=f"{name}, {dtype}", xlabel="P", ylabel="ms of an acceleration step", yscale="log"
        )
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
