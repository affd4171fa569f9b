"""Trainings of two ranks on each of two hosts, by every launcher."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from launching import HOROVODRUN, ROOT
from network import HOSTS

PROGRAM = str(ROOT / "tests" / "hosts" / "program.py")
LAUNCHERS = ("mpirun", "mpi", "gloo", "torchrun")


class Training:
    """One that runs, of tests/hosts/program.py.

    Args:
        network: the hosts.
        launcher: one of `LAUNCHERS`; "mpi" and "gloo" are horovodrun's.
        folder: for checkpoints and weights.
        arguments: of the program.
        options: of the launcher.
        environment: variables to add.
    """

    def __init__(self, network, launcher, folder, *arguments, options=(), **environment):
        python = network.warm()
        engine = "torch" if launcher == "torchrun" else "horovod"
        command = [*python, PROGRAM, engine, folder, *arguments]
        variables = {
            "PATH": network.path,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            # The wheel of Open MPI needs it, and a fork does not set it.
            **{name: os.environ[name] for name in ("OPAL_PREFIX",) if name in os.environ},
            **environment,
        }
        if launcher == "torchrun":
            # The endpoint's store is on the first host.
            meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={HOSTS[0]}:29400", "--rdzv-id=job"]
            size = [f"--nnodes={len(HOSTS)}", "--nproc-per-node=2"]
            start = [*python, "-m", "torch.distributed.run", *size, *meet, *options, "--no-python"]
            commands = {host: [*start, *command] for host in HOSTS}
        elif launcher == "mpirun":
            passed = [word for name in variables for word in ("-x", name)]
            where = ["-H", ",".join(f"{host}:2" for host in HOSTS), "--bind-to", "none"]
            start = ["mpirun", "-np", "4", *where, *passed, *options]
            commands = {HOSTS[0]: [*start, *command]}
        else:
            where = ["-H", ",".join(f"{host}:2" for host in HOSTS)]
            start = [*python, *HOROVODRUN[1:], "-np", "4", f"--{launcher}", *where, *options]
            commands = {HOSTS[0]: [*start, *command]}
        self.began = time.time()
        self.ended = {}  # when the launcher on a host has ended; its exit code
        self._lines, self._threads = [], []
        for host, words in commands.items():
            process = subprocess.Popen(
                network.on(host, *words), cwd=ROOT, text=True, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=dict(os.environ) | variables,
            )  # fmt: skip
            thread = threading.Thread(target=self._read, args=(host, process), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _read(self, host, process):
        for line in process.stdout:
            self._lines.append(f"{time.time() - self.began:7.2f} {host} {line.rstrip()}")
        self.ended[host] = time.time(), process.wait()

    @property
    def output(self):
        """All lines, each with the seconds since the start and the launcher's host."""
        return "\n".join(self._lines)

    def until(self, pattern, limit=60):
        """Waits for an output. The test fails where it does not come."""
        end = time.monotonic() + limit
        while not re.search(pattern, self.output):
            if time.monotonic() > end or len(self.ended) == len(self._threads):
                pytest.fail(f"no {pattern!r}:\n{self.output[-8000:]}")
            time.sleep(0.02)

    def wait(self, limit):
        """Waits until all launchers have ended; the exit codes. The test fails where they do not."""
        end = time.monotonic() + limit
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        if len(self.ended) < len(self._threads):
            pytest.fail(f"no end after {limit} s, but of {list(self.ended)}:\n{self.output[-8000:]}")
        return [self.ended[host][1] for host in sorted(self.ended)]
