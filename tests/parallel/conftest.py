"""Every rank runs the same tests in the same order; a failure on any rank ends them all."""

import os
import sys
import time

import horovod.torch as hvd
import pytest
import torch

SIZE = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ["HOROVOD_SIZE"])
# Of several hosts Gloo can only make process sets with the same number of ranks on each.
SEVERAL_HOSTS = int(os.environ.get("HOROVOD_CROSS_SIZE", 1)) > 1
# Halves, or ranks by themselves where there are no two of one size.
HALF = SIZE // 2 if SIZE % 2 == 0 else 1
GROUPS = [tuple(range(lo, lo + HALF)) for lo in range(0, SIZE, HALF)]
# Proper subsets, one of which does not begin at rank 0.
ALL_BUT_RANK_0, ALL_BUT_THE_LAST = tuple(range(1, SIZE)), tuple(range(SIZE - 1))
# Horovod wants to know of them from the start, and each of them once.
PROCESS_SETS = {
    ranks: hvd.ProcessSet(ranks)
    for ranks in (ALL_BUT_RANK_0, ALL_BUT_THE_LAST, *GROUPS)
    if SIZE > 1 and not SEVERAL_HOSTS
}


def pytest_configure(config):
    hvd.init(process_sets=list(PROCESS_SETS.values()) or None)
    if not hvd.mpi_enabled():
        wait_asleep()


def wait_asleep():
    """Horovod waits in a loop of sched_yield, its own threads for a core.

    On Gloo, where there are fewer cores than ranks, asleep is 4 to 10 times faster.
    """
    library = hvd.mpi_ops.mpi_lib
    poll, wait = library.horovod_torch_poll, library.horovod_torch_wait_and_clear

    def asleep(handle):
        while not poll(handle):
            time.sleep(1e-5)
        return wait(handle)

    library.horovod_torch_wait_and_clear = asleep


def process_set(ranks):
    if ranks not in PROCESS_SETS:
        pytest.skip("needs two ranks on one host")
    return PROCESS_SETS[ranks]


@pytest.fixture(scope="session")
def shard_groups():
    return [process_set(ranks) for ranks in GROUPS]


@pytest.fixture(scope="session")
def nodes():
    """Number of hosts that the launcher was given."""
    return hvd.size() // hvd.local_size()


@pytest.fixture(scope="session")
def all_but_rank_0():
    return process_set(ALL_BUT_RANK_0)


@pytest.fixture(scope="session")
def all_but_the_last():
    return process_set(ALL_BUT_THE_LAST)


def pytest_sessionfinish(session, exitstatus):
    session.config.exitstatus = int(exitstatus)


def pytest_unconfigure(config):
    """After the report is written: leaves without Horovod's shutdown where a test has failed.

    The shutdown would wait for ranks that wait for this one.
    """
    if status := getattr(config, "exitstatus", 1):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def pytest_report_header(config):
    controller = "MPI" if hvd.mpi_enabled() else "Gloo"
    return f"rank {hvd.rank()} of {hvd.size()}, Horovod on {controller}"


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(1234)
