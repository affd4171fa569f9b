"""All that a GPU is needed for, in one go of ten minutes: `python -m benchmarks.gpu.session`.

In this order: the tests of Triton's kernels and of training on a GPU; both methods' acceleration
step on 1, 6 and 1,536 simulated ranks; ResNet50's training step with and without acceleration,
batch 64 and 256. What fails or takes too long is said, and the next begins. The last line says what
has ended well. Results are written into the folder --out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.launch import ROOT

PYTEST = "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"


class Job(NamedTuple):
    """A command.

    Attributes:
        name: what it is called in messages.
        words: arguments of Python; {out}, {device}, {sizes} and {cycles} are filled in.
        seconds: after which it is ended.
    """

    name: str
    words: tuple[str, ...]
    seconds: float


def _steps(batch: int, method: str, seconds: float) -> Job:
    words = "-m benchmarks.gpu --no-parts --device={device} --cycles={cycles} "
    words += "--model={network} --image-size={pixels}"
    out = f" --batch={batch} --method={method} --out={{out}}/steps-{batch}-{method}.json"
    return Job(f"ResNet50's step, batch {batch}, {method}", (*(words + out).split(),), seconds)


_PARTS = "-m benchmarks.gpu --no-steps --device={device} --cycles={cycles} --dtypes=float32 "
_PARTS += "--parameters={network} --ranks 1 6 1536 --out={out}/parts.json"
_HOST = "-m benchmarks.host --device={device} --whole --parameters={network} --bases SGD "
_HOST += "--ranks 1 6 1536 --steps=60 --out={out}/host.json --settings residual-norm subspace"
JOBS = (
    Job("kernels", (*PYTEST, "tests/unit/test_kernels.py"), 90),
    Job("training on a GPU", (*PYTEST, "tests/gpu"), 90),
    Job("parts, residual-norm method", (*_PARTS.split(),), 90),
    Job("both methods by kind of step", (*_HOST.split(), "subspace, cuda_graphs=True"), 120),
    _steps(64, "subspace", 60),
    _steps(64, "residual", 60),
    _steps(256, "subspace", 45),
    _steps(256, "residual", 45),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all jobs; returns 0 if all ended well, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.session", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--seconds", type=float, default=600, help="in all; default: %(default)s")
    parser.add_argument("--trial", action="store_true", help="small, on the processor")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    values = {"out": str(options.out), "device": "cuda", "cycles": "10", "network": "resnet50"}
    values["pixels"] = "224"
    if options.trial:
        values |= {"device": "cpu", "cycles": "1", "network": "resnet8", "pixels": "32"}
    end, well = time.monotonic() + options.seconds, []
    for job in JOBS:
        left = min(job.seconds, end - time.monotonic())
        words = [word.format_map(values) for word in job.words]
        print(f"\n== {job.name}: python {' '.join(words)}", flush=True)
        code = _run(words, left)
        print(f"== {job.name}: {code or 'ended well'}", flush=True)
        well += [job.name] if code is None else []
    print(f"\n{len(well)} of {len(JOBS)} ended well: {'; '.join(well)}")
    return int(len(well) < len(JOBS))


def _run(words: Sequence[str], seconds: float) -> str | None:
    """Runs Python in the checkout; None if it ends well, else why not."""
    if seconds <= 0.0:
        return "not begun: no time is left"
    try:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"ended after {seconds:.0f} s"
    return f"exit code {done.returncode}" if done.returncode else None


if __name__ == "__main__":
    sys.exit(main())
