"""The communicators that need no launcher: one rank, and simulated ones."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance import CHECKS

from aadl_hvd import CommunicationError
from aadl_hvd.comm.local import LocalCommunicator
from aadl_hvd.comm.simulated import run_ranks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_local(check):
    check(LocalCommunicator())


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_simulated(check, size):
    run_ranks(size, check)


@pytest.mark.parametrize("operation", ["allreduce", "broadcast", "allgather", "sum_tensor", "none"])
def test_a_failing_rank_releases_the_others(operation):
    """Its own error comes out, at once, whatever the others wait for."""
    released = []

    def program(comm):
        if comm.rank == 1:
            raise KeyError("rank 1")
        try:
            if operation in ("allreduce", "broadcast"):
                getattr(comm, operation)(np.zeros(2))
            elif operation != "none":
                getattr(comm, operation)(torch.zeros(2))
        except CommunicationError:
            released.append(comm.rank)
            raise

    start = time.monotonic()
    with pytest.raises(KeyError, match="rank 1"):
        run_ranks(3, program)
    assert time.monotonic() - start < 10
    assert sorted(released) == ([] if operation == "none" else [0, 2])


def test_a_rank_that_does_not_come_is_missed():
    def program(comm):
        if comm.rank == 0:
            comm.allreduce(np.zeros(1))

    with pytest.raises(CommunicationError, match="did not come"):
        run_ranks(2, program, timeout=0.2)


def test_results_by_rank():
    assert run_ranks(3, lambda comm: (comm.rank, comm.size)) == [(0, 3), (1, 3), (2, 3)]


def test_simulated_ranks_share_no_memory():
    """As on real ranks: what one does to its result is not seen by another."""

    def program(comm):
        for result in (
            comm.broadcast(np.zeros(3)),
            comm.allreduce(np.zeros(3)),
            comm.allgather(torch.zeros(3)),
            comm.sum_tensor(torch.zeros(3)),
            comm.allgather_object(np.zeros(3))[0],
        ):
            result += comm.rank + 1
            comm.allreduce(np.zeros(1))
            assert (np.asarray(result) == comm.rank + 1).all()

    run_ranks(3, program)


def test_an_object_is_gathered_as_it_was():
    """Its rank may change it at once, while other ranks still read what they have got."""

    class Changed:
        def __init__(self, value):
            self.value, self.thread = value, threading.get_ident()

        def __deepcopy__(self, memo):
            if threading.get_ident() != self.thread:
                time.sleep(0.1)
            return Changed(self.value)

    def program(comm):
        item = Changed("before")
        found = comm.allgather_object(item)
        item.value = "after"
        return [each.value for each in found]

    assert run_ranks(2, program) == [["before"] * 2] * 2


AT_THE_END = """
import torch.distributed as dist
from aadl_hvd.comm import torch_distributed

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for _ in range(2):
    torch_distributed.TorchCommunicator(dist.group.WORLD)
torch_distributed.time.sleep = lambda seconds: print("waits for", seconds)
dist.destroy_process_group()
print("ends")
"""


def test_threads_of_gloo_have_python_once_more_before_it_ends():
    """Else one that still holds tensors may abort a process that has ended well."""
    run = [sys.executable, "-c", AT_THE_END]
    found = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout == "ends\nwaits for 0.1\n"
