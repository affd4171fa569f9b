"""torchrun inside a Slurm job: the program that srun starts once on each node."""

from __future__ import annotations

from launch.job import PREEMPTED

AGENT = f"""\
import os, pathlib, signal, sys
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

def pass_on(number, frame):
    # torchrun itself would end the ranks at such a signal.
    for file in pathlib.Path("/proc/self/task").glob("*/children"):
        for rank in file.read_text().split():
            os.kill(int(rank), number)

signal.signal(signal.SIGUSR1, pass_on)
try:
    run.run(run.parse_args(sys.argv[1:]))
except ChildFailedError as error:
    print(error, file=sys.stderr)
    codes = {{failure.exitcode for failure in error.failures.values()}}
    # torchrun ends the other ranks of a node when one has left, at last by SIGKILL.
    ends = {{{PREEMPTED}, -signal.SIGTERM, -signal.SIGKILL}}
    stopped = {PREEMPTED} in codes and codes <= ends
    sys.exit({PREEMPTED} if stopped else 1)"""
"""Python code of torchrun with two differences: SIGUSR1 goes to the ranks, and ranks that have
stopped themselves are told by the exit code. It is part of the job script, so nodes need torch
alone."""
