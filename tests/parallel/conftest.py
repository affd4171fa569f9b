"""Every rank runs the same tests in the same order; a failure on any rank ends them all."""

import os
import sys

import horovod.torch as hvd
import pytest
import torch

SIZE = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ["HOROVOD_SIZE"])
# Of several hosts Gloo can only make process sets with the same number of ranks on each.
SEVERAL_HOSTS = int(os.environ.get("HOROVOD_CROSS_SIZE", 1)) > 1
# A proper subset, which does not begin at rank 0. Horovod wants to know of it from the start.
ALL_BUT_RANK_0 = hvd.ProcessSet(range(1, SIZE)) if SIZE > 1 and not SEVERAL_HOSTS else None
# Halves, or ranks by themselves where there are no two of one size.
HALF = SIZE // 2 if SIZE % 2 == 0 else 1
GROUPS = [range(lo, lo + HALF) for lo in range(0, SIZE, HALF)]
SHARD_GROUPS = {
    tuple(ranks): hvd.ProcessSet(ranks)
    for ranks in GROUPS
    if ranks != range(1, SIZE) and not SEVERAL_HOSTS
}


def pytest_configure(config):
    sets = [ALL_BUT_RANK_0, *SHARD_GROUPS.values()]
    hvd.init(process_sets=sets if ALL_BUT_RANK_0 is not None else None)


@pytest.fixture(scope="session")
def shard_groups():
    if ALL_BUT_RANK_0 is None:
        pytest.skip("needs two ranks on one host")
    return [SHARD_GROUPS.get(tuple(ranks), ALL_BUT_RANK_0) for ranks in GROUPS]


@pytest.fixture(scope="session")
def nodes():
    """Number of hosts that the launcher was given."""
    return hvd.size() // hvd.local_size()


@pytest.fixture(scope="session")
def all_but_rank_0():
    if ALL_BUT_RANK_0 is None:
        pytest.skip("needs two ranks on one host")
    return ALL_BUT_RANK_0


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
