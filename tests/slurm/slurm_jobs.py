"""Jobs that `python -m launch --submit` hands to a Slurm."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from launching import ROOT, warm

TRAIN = (
    "--model=resnet8", "--width=4", "--channels=1", "--image-size=16", "--resize=16",
    "--batch-size=100", "--log-every=1", "--no-tensorboard", "--device=cpu", "--resume=auto",
    "--no-check-images", "--loader=torch", "--workers=0",
)  # fmt: skip


class Jobs:
    """Submits jobs to a Slurm and waits for them.

    Args:
        cluster: a started `Cluster`.
        folder: where jobs run, and their output is.
    """

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        self.programs = folder / "programs"
        self.programs.mkdir()
        path = [self.programs, Path(sys.executable).parent, cluster.environment["PATH"]]
        self.environment = cluster.environment | {
            "PATH": os.pathsep.join(map(str, path)),
            "PYTHONPATH": str(ROOT),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }

    def fork(self):
        """Has `python` forked from a process that has imported torch and Horovod; see warm.py."""
        python = self.programs / "python"
        python.write_text(f'#!/bin/sh\nexec {shlex.join(warm())} "$@"\n')
        python.chmod(0o755)

    def launch(self, *options, command):
        """`python -m launch --submit` for one node of two ranks; what subprocess.run returns."""
        words = {"machine": "slurm", "nodes": "1", "cores-per-node": "2", "ranks-per-node": "2",
                 "walltime": "10"}  # fmt: skip
        given = {word.split("=")[0].removeprefix("--") for word in options}
        defaults = [f"--{name}={value}" for name, value in words.items() if name not in given]
        return subprocess.run(
            [sys.executable, "-m", "launch", "--submit", f"--directive=--chdir={self.folder}",
             *defaults, *options, "--", *command],
            env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def submit(self, *options, command):
        """The number of a job that was taken."""
        done = self.launch(*options, command=command)
        assert done.returncode == 0, done.stderr
        return int(re.fullmatch(r"job (\d+)\n", done.stdout).group(1))

    def output(self, number):
        """All that a job has printed so far."""
        return "".join(path.read_text() for path in self.folder.glob(f"*-{number}.out"))

    def end(self, number, *states, limit=150):
        """Waits until a job has ended in one of some states; its output."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL")
        job = self.cluster.wait(number, *ends, limit=limit)
        assert job["JobState"] in states, f"{job}\n{self.output(number)[-6000:]}"
        return self.output(number)
