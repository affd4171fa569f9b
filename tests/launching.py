"""Starts programs as users do: plainly, under horovodrun or under mpirun."""

import ast
import functools
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# horovodrun, but that it does not import torch each time, to ask Horovod what it was built with.
# That is 4 seconds of every launch; the tests ask themselves.
HOROVODRUN = (
    sys.executable,
    "-c",
    "from horovod.runner import launch\n"
    "launch.mpi_built = launch.gloo_built = lambda verbose: True\n"
    "launch.run_commandline()",
)


def documented(example):
    """The commands in the docstring of an example, each as the words that a shell makes of it."""
    text = ast.get_docstring(ast.parse((ROOT / "examples" / f"{example}.py").read_text()))
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("    ")]


@functools.cache
def warm():
    """What stands for `python` in a command, to have its program forked; see warm.py.

    The process that is forked lives as long as this one.
    """
    path = Path(tempfile.mkdtemp(prefix="warm")) / "socket"
    program = str(ROOT / "tests" / "warm.py")
    server = subprocess.Popen(
        [sys.executable, program, "serve", path],
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdout.readline() == b"ready\n", "there is no warm process"
    _alive.append(server)
    return [sys.executable, "-I", "-S", program, "run", str(path)]


_alive = []


def run_command(command, limit, environment=None, errors=subprocess.STDOUT):
    """Runs a command; its exit code, its output, and its errors (None: among the output).

    One that does not end within `limit` seconds is killed, with all it has started, and fails the
    test.
    """
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1") | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,
    )
    try:
        found = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        found = process.communicate()
        text = "".join(part or "" for part in found)
        pytest.fail(f"no end after {limit} s: {' '.join(process.args)}\n{text[-6000:]}")
    return process.returncode, *found


def start(
    program,
    *arguments,
    ranks=1,
    controller=None,
    hosts=None,
    limit=150,
    forked=True,
    **environment,
):
    """Runs a Python program on some ranks; its exit code and all its output.

    Args:
        program: a file, a module, or an option of Python such as -m, the rest in `arguments`.
        arguments: of the program.
        ranks: how many.
        controller: "gloo" or "mpi", under horovodrun; "mpirun", under that; None: no launcher for
            one rank, else "gloo".
        hosts: as for horovodrun -H.
        limit: see `run_command`.
        forked: from a process that has imported torch and Horovod, the launcher too; False: as
            users start it.
        environment: variables to add.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = [] if program.startswith("-") or program.endswith(".py") else ["-m"]
    python = warm() if forked else [sys.executable]
    command = [*python, *words, program, *arguments]
    if controller == "mpirun":
        command = ["mpirun", "--oversubscribe", "-np", ranks, *command]
    elif controller is not None or ranks > 1:
        on = ["-H", hosts] if hosts else []
        command = [
            *python,
            *HOROVODRUN[1:],
            "-np",
            ranks,
            f"--{controller or 'gloo'}",
            *on,
            *command,
        ]
    variables = {"PYTHONPATH": str(ROOT), "PATH": path} | environment
    code, output, _ = run_command(command, limit, variables)
    return code, output


def torchrun(*words, ranks, options=(), limit=300, **environment):
    """Runs a Python program on some ranks of torch.distributed; its exit code and its output.

    Args:
        words: a file, or -m and a module, and the program's arguments.
        ranks: how many.
        options: of torchrun.
        limit: see `run_command`.
        environment: variables to add.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={ranks}", *options, *words]
    code, output, _ = run_command(command, limit, {"GLOO_SOCKET_IFNAME": "lo"} | environment)
    return code, output
