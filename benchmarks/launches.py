"""Counts what the host starts on a GPU in the steps of one rank of many, on a pretended GPU.

No GPU is needed, and none has confirmed the counts: they are operations of torch on tensors of the
pretended device (`benchmarks/pretend_gpu.py`) that are no views. An operation on a list of
tensors counts as often as torch starts a kernel for it. A CUDA graph counts as one, whatever is in
it. Nothing is timed. Own gradients are sampled one by one, as in the backward pass with Horovod.

The weights are 400,000 numbers in as many tensors as ResNet50 has: enough for the gradient to be
sampled, and few enough for one pass over all of them to be one chunk. With 25 million numbers and
Triton's kernels it is one as well. Without them the checksum is 13 chunks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

from aadl_hvd.optim.gradient_samples import GradientSamples
from benchmarks import command, report
from benchmarks.host import Run, Setting
from benchmarks.pretend_gpu import PretendGpu
from benchmarks.workload import shapes_of
from models.errors import UserError

OUT = report.RESULTS / "launches.json"
# In these no point of the residual-norm method is rejected: a gradient's noise is next to nothing,
# and the minimum stays.
CALM = {"noise": 1e-6}
MOVING = {"noise": 1e-3, "drift": 0.02}
# Steps from one accelerated point to the next, and what is set.
CASES = {
    "residual-norm, p = q = 5": (
        5,
        Setting({"method": "residual", "frequency": 5, "store_every": 5}, **CALM),
    ),
    "residual-norm": (2, Setting({"method": "residual"}, **CALM)),
    "subspace": (10, Setting({"method": "subspace"}, **MOVING)),
    "subspace, overlap=True": (11, Setting({"method": "subspace", "overlap": True}, **MOVING)),
    "subspace, cuda_graphs=True": (
        10,
        Setting({"method": "subspace", "cuda_graphs": True}, **MOVING),
    ),
    "subspace, overlap=True, cuda_graphs=True": (
        11,
        Setting({"method": "subspace", "overlap": True, "cuda_graphs": True}, **MOVING),
    ),
}
# Steps before anything is counted: histories are full. CUDA graphs take twice as many: the sums
# over a full history have three, and each is captured at its third call.
WARM = 110


def main(arguments: Sequence[str] | None = None) -> int:
    """Counts; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        command.at_least(1, options, "ranks", "cycles")
        command.at_least(0, options, "warm")
        report.prepare(options.out.parent)
        torch.set_num_threads(1)
        shapes = shapes_of(options.parameters)
        runs = []
        for name in options.cases:
            runs.append(count(name, shapes, options.ranks, options.warm, options.cycles))
            print(markdown(runs[-1:]), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = {"parameters": options.parameters, "tensors": len(shapes), "ranks": options.ranks}
    report.write(options.out, found | {"device": "pretended", "base": "SGD", "runs": runs})
    print(f"\n{markdown(runs)}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    add = made.add_argument
    add("--parameters", default="400000", metavar="NETWORK", help="default: %(default)s")
    add("--ranks", type=int, default=1536, help="default: %(default)s")
    add("--warm", type=int, default=WARM, help="steps before; default: %(default)s")
    add("--cycles", type=int, default=2, help="counted; default: %(default)s")
    add("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME",
        help=f"of {', '.join(map(repr, CASES))}; default: all")  # fmt: skip
    add("--out", type=report.Path, default=OUT, help="default: %(default)s")
    return made


class _Counter:
    """Around a piece of work: `last` is how many launches it was."""

    def __init__(self, gpu: PretendGpu) -> None:
        self._gpu, self.last = gpu, 0

    def __enter__(self) -> None:
        self.last = -self._gpu.launches

    def __exit__(self, *_: object) -> None:
        self.last += self._gpu.launches


def _one_by_one(samples: GradientSamples) -> None:
    """`GradientSamples.take_all`, as Horovod's hooks do it."""
    for p in samples.parameters:
        samples.take(p)


def count(
    case: str, shapes: Sequence[torch.Size], ranks: int, warm: int, cycles: int
) -> dict[str, Any]:
    """Counts the launches of whole cycles: the steps that end with an accelerated point.

    Args:
        case: one of CASES.
        shapes: of the tensors.
        ranks: P.
        warm: steps before anything is counted.
        cycles: how many; cycles in which no point is accelerated do not count.

    Returns:
        "case"; "steps" of a cycle; "launches" of a cycle beyond the base optimizer's, mean;
        "most" of a step, the median of the cycles; "least" of a step, the same.

    Raises:
        UserError: fewer than `cycles` points were accelerated in four times as many cycles.
    """
    steps, setting = CASES[case]
    with PretendGpu() as gpu, mock.patch.object(GradientSamples, "take_all", _one_by_one):
        counter = _Counter(gpu)
        plain, ours = (Run("SGD", s, shapes, ranks, "pretended") for s in (None, setting))
        plain.around = ours.around = counter
        plain.step()
        base, kinds = counter.last, ours.kinds()
        for _ in range(2 * warm if setting.config.get("cuda_graphs") else warm):
            next(kinds)
        found: list[int] = []
        whole: list[list[int]] = []
        while len(whole) < cycles and len(found) < 4 * cycles * steps:
            kind, _ = next(kinds)
            found.append(counter.last - base)
            if kind == "accelerated" and len(found) >= steps:
                whole.append(found[-steps:])
    if len(whole) < cycles:
        raise UserError(f"{case}: {len(whole)} accelerated points in {len(found)} steps, too few")
    return {
        "case": case,
        "steps": steps,
        "launches": statistics.mean(map(sum, whole)),
        "most": statistics.median(map(max, whole)),
        "least": statistics.median(map(min, whole)),
    }


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """The runs as a table."""
    head = ["", "steps of a cycle", "launches of a cycle", "most of a step", "least of a step"]
    keys = "steps", "launches", "most", "least"
    return report.table(head, [[run["case"], *(f"{run[key]:g}" for key in keys)] for run in runs])


if __name__ == "__main__":
    sys.exit(main())
