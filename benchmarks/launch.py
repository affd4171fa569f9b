"""Starts a program on several ranks of this machine, and describes the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

from models.errors import UserError

ROOT = Path(__file__).parents[1]
TAG = re.compile(r"\[\d+(?:,\d+)?\]<std(?:out|err)>:")


def controller() -> str | None:
    """What Horovod runs on: "mpi" where it was built with it and mpirun is there, else "gloo".

    None where there is no Horovod.
    """
    try:
        import horovod.torch as hvd
    except ImportError:
        return None
    return "mpi" if hvd.mpi_built() and shutil.which("mpirun", path=_path()) else "gloo"


def run_on_ranks(
    module: str, *arguments: str, ranks: int, cycle_time: float | None, output: TextIO
) -> int:
    """Runs `python -m module arguments` under horovodrun and passes its output on.

    Args:
        module: module to run, from the root of the checkout.
        arguments: its command line.
        ranks: number of ranks, all on this machine.
        cycle_time: milliseconds for which Horovod gathers tensors before it reduces them; None: the
            environment's value or Horovod's default.
        output: stream for all the program's output.

    Returns:
        The exit code.

    Raises:
        UserError: there is no horovodrun.
    """
    environment = dict(os.environ, PATH=_path())
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as launch/ has it
    if cycle_time is not None:
        environment.setdefault("HOROVOD_CYCLE_TIME", f"{cycle_time:g}")
    before = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    horovodrun = shutil.which("horovodrun", path=_path())
    if horovodrun is None:
        raise UserError("horovodrun is not on PATH: is Horovod installed in this environment?")
    command = [horovodrun, "-np", str(ranks), f"--{controller()}"]
    command += [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(TAG.sub("", line.rstrip()), file=output, flush=True)
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def describe_machine() -> dict[str, Any]:
    """Processor, memory and versions; nothing that names the machine or its files."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "horovod", "numpy", "mpi4py")},
        "controller": controller(),
    }


def version(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _path() -> str:
    # horovodrun and mpirun lie beside this Python in an environment that is not activated.
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
