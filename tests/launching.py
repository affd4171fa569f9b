"""Starts programs as users do: plainly, under horovodrun or under mpirun."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def start(program, *arguments, ranks=1, controller="gloo", limit=150, **environment):
    """Runs a program on some ranks, without a launcher on one; its exit code and all its output.

    A run that does not end within `limit` seconds is killed and fails the test.

    Args:
        program: a file, a module, or "-m", "-c" and the like, after which `arguments` say more.
        arguments: of the program.
        ranks: how many; 0 is one rank under the launcher.
        controller: "gloo" or "mpi" under horovodrun, "mpirun" without it.
        limit: seconds.
        environment: variables to add.
    """
    binaries = Path(sys.executable).parent
    variables = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), **environment)
    variables["PATH"] = f"{binaries}{os.pathsep}{variables['PATH']}"
    words = [] if program.startswith("-") or program.endswith(".py") else ["-m"]
    command = [sys.executable, *words, program, *map(str, arguments)]
    if ranks != 1:
        command = [*_launcher(max(ranks, 1), controller), *command]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"no end after {limit} s: {' '.join(command)}\n{output[-6000:]}")
    return process.returncode, output


def _launcher(ranks, controller):
    if controller == "mpirun":
        return ["mpirun", "--oversubscribe", "-np", str(ranks)]
    return ["horovodrun", "-np", str(ranks), f"--{controller}"]
