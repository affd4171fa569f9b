"""Every rank runs the same tests in the same order; a failure on any rank ends them all."""

import os
import sys

import horovod.torch as hvd
import pytest
import torch

SIZE = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ["HOROVOD_SIZE"])
# A proper subset, which does not begin at rank 0. Horovod wants to know of it from the start.
ALL_BUT_RANK_0 = hvd.ProcessSet(range(1, SIZE)) if SIZE > 1 else None


def pytest_configure(config):
    hvd.init(process_sets=[ALL_BUT_RANK_0] if ALL_BUT_RANK_0 else None)


@pytest.fixture(scope="session")
def all_but_rank_0():
    if ALL_BUT_RANK_0 is None:
        pytest.skip("needs two ranks")
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
