"""Trainings of two ranks on each of two hosts, by every launcher."""

import functools
import os
import re
import subprocess
import sys
import threading
import time

import pytest
import torch
from launching import HOROVODRUN, ROOT
from network import HOSTS

from aadl_hvd import AndersonConfig, AndersonOptimizer

sys.path.append(str(ROOT / "tests" / "ddp"))
import training

PROGRAM = str(ROOT / "tests" / "hosts" / "program.py")
BOUND = 90
"""Seconds within which every launcher ends here after a host is silent; docs/faults.md.

Each of the times below is about 10 seconds. On busy cores processes need much longer to end.
"""
START = 200
"""Seconds that a training may take to start, and an undisturbed one to end. It is no bound of the
software: only a training that hangs takes so long, however busy the cores are."""
# Open MPI's daemons look after each other: after 5 seconds, and then 3 times every 2 seconds. It
# takes these from the environment, as horovodrun does.
SHORT = {
    "OMPI_MCA_oob_tcp_keepalive_time": "5",
    "OMPI_MCA_oob_tcp_keepalive_intvl": "2",
    "OMPI_MCA_oob_tcp_keepalive_probes": "3",
    "HOROVOD_GLOO_TIMEOUT_SECONDS": "10",
    "HOROVOD_DYNAMIC_PROCESS_SETS": "1",
    # horovodrun starts Python on each host first, to look for networks. Busy cores need longer
    # than its 30 seconds.
    "HOROVOD_START_TIMEOUT": str(START),
}


class Training:
    """One that runs, of tests/hosts/program.py.

    Args:
        network: the hosts.
        launcher: "mpirun" or "torchrun", or horovodrun's "mpi" or "gloo"; "static": torchrun, whose
            agents share no store after the start.
        folder: for checkpoints and weights.
        arguments: of the program.
        options: of the launcher.
        environment: variables to add.
    """

    def __init__(self, network, launcher, folder, *arguments, options=(), **environment):
        self.network, self.launcher = network, launcher
        python = network.warm()
        engine = "torch" if launcher in ("torchrun", "static") else "horovod"
        command = [*python, PROGRAM, engine, folder, "--timeout", 10, *arguments]
        variables = {
            "PATH": network.path,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            # The wheel of Open MPI needs it, and a fork does not set it.
            **{name: os.environ[name] for name in ("OPAL_PREFIX",) if name in os.environ},
            **SHORT,
            **environment,
        }
        if engine == "torch":
            # The endpoint's store is on the first host.
            meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={HOSTS[0]}:29400", "--rdzv-id=job"]
            size = [f"--nnodes={len(HOSTS)}", "--nproc-per-node=2"]
            start = [*python, "-m", "torch.distributed.run", *size, *options]
            commands = {}
            for i, host in enumerate(HOSTS):
                if launcher == "static":
                    meet = [f"--node-rank={i}", f"--master-addr={HOSTS[0]}", "--master-port=29400"]
                commands[host] = [*start, *meet, "--no-python", *command]
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

    def seconds_after(self, moment):
        """When each launcher has ended."""
        return {host: round(end - moment, 1) for host, (end, _) in self.ended.items()}

    def left(self):
        """Command lines of what still runs on the hosts."""
        found = [line for host in HOSTS for line in self.network.processes(host).values()]
        return [line for line in found if "warm.py serve" not in line]

    def wait_for_ranks(self, limit):
        """Waits until nothing is left on the hosts. The test fails where it does not end."""
        end = time.monotonic() + limit
        while left := self.left():
            if time.monotonic() > end:
                pytest.fail(f"still there: {left}\n{self.output[-8000:]}")
            time.sleep(0.2)
        self.ended = {host: (max(at, time.time()), code) for host, (at, code) in self.ended.items()}

    def until(self, pattern, limit=START):
        """Waits for an output. The test fails where it does not come."""
        end = time.monotonic() + limit
        while not re.search(pattern, self.output):
            if time.monotonic() > end or len(self.ended) == len(self._threads):
                pytest.fail(f"no {pattern!r}:\n{self.output[-8000:]}")
            time.sleep(0.02)

    def wait(self, limit):
        """Waits until all launchers have ended; the exit codes by host.

        The test fails where they do not end.
        """
        end = time.monotonic() + limit
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        if len(self.ended) < len(self._threads):
            pytest.fail(
                f"no end after {limit} s, but of {list(self.ended)}; still there: {self.left()}\n"
                f"{self.output[-8000:]}"
            )
        return {host: code for host, (_, code) in self.ended.items()}


def weights(folder):
    """Those of all ranks, which have the same bits."""
    first, *others = (torch.load(folder / f"weights{rank}.pt") for rank in range(4))
    assert all(torch.equal(first, other) for other in others)
    return first


@functools.cache
def reference(steps):
    """The weights of the same training in one process."""
    model = training.network()
    settings = {"noise_gate": None, "history_depth": 4, "averages": ()}
    anderson = AndersonConfig(method="residual", **settings)
    opt = AndersonOptimizer(training.sgd(model), anderson=anderson)
    return training.train(model, opt, steps, part=slice(None))[-1]
