"""Every kernel compiles for the GPUs it is meant for, on a machine that may have none.

The signatures are those of real calls: the kernels are replaced by one that notes what it is
given. A process of its own does it, for Triton's interpreter is on in the others.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton, which has no wheel for this platform")
ROOT = Path(__file__).parent.parent.parent
GPUS = {"V100": 70, "A100": 80, "H100": 90, "Blackwell": 100}
KERNELS = {"inner", "update", "gains", "add_to_means", "sum_bits"}


def noted_calls():
    """(kernel's name, types of its arguments, constants) of all calls, each once."""
    import torch

    from aadl_hvd import kernels

    names = {
        torch.float64: "fp64",
        torch.float32: "fp32",
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.int64: "i64",
    }
    noted = {}

    def kind(value):
        return f"*{names[value.dtype]}" if isinstance(value, torch.Tensor) else "i64"

    class Noting:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def call(*arguments, **constants):
                called = dict(zip(self.kernel.arg_names, arguments, strict=False))
                types = {name: kind(value) for name, value in called.items()}
                key = (self.kernel.__name__, *types.values(), *map(str, constants.values()))
                noted[key] = (self.kernel, types, constants)

            return call

    for name in KERNELS:
        setattr(kernels.source, name, Noting(getattr(kernels.source, name)))
    cpu = torch.device("cpu")
    every, m, rows = slice(0, 40), 3, 40
    everything = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for work in (torch.float32, torch.float64):
        v, c = torch.ones(rows, dtype=work), torch.ones(m, dtype=work)
        averages = [torch.ones(2, rows, dtype=work)] * 4
        kernels.gains(v, v, averages, every)
        kernels.add_to_means(v, v, averages, [0.5] * 4)
        for stored in dict.fromkeys((work, torch.float32, torch.bfloat16)):
            columns = torch.ones(m, rows, dtype=stored)
            kernels.inner(columns, [0], v, every)
            kernels.update(v, c, columns, c, every, v, in_r=c, columns=columns, weight=v, start=v)
    for own in everything:
        kernels.Checksum([rows], cpu).of([torch.ones(rows, dtype=own)], 2**36 - 5)
    return list(noted.values())


def compile_all():
    """Prints, as JSON, how many variants of each kernel were compiled for each GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    done = {}
    for kernel, types, constants in noted_calls():
        names = kernel.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        values = {(names.index(name),): value for name, value in constants.items()}
        for gpu, capability in GPUS.items():
            source = ASTSource(fn=kernel, signature=signature, constexprs=values)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert made.asm["cubin"], (kernel.__name__, types, gpu)
            counts = done.setdefault(kernel.__name__, dict.fromkeys(GPUS, 0))
            counts[gpu] += 1
    print(json.dumps(done))


def test_all_kernels_compile_for_all_gpus(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.test_kernels_compile"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    done = json.loads(run.stdout.splitlines()[-1])
    assert done.keys() == KERNELS
    assert all(min(counts.values()) > 0 for counts in done.values()), done


if __name__ == "__main__":
    compile_all()
