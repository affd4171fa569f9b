"""The communicators that need no launcher: one rank, and simulated ones."""

import threading
import time

import numpy as np
import pytest
import torch
from conformance import CHECKS

from aadl_hvd import CommunicationError
from aadl_hvd.comm.local import LocalCommunicator
from aadl_hvd.comm.simulated import run_ranks


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
