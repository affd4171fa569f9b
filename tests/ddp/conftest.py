"""Every rank runs the same tests in the same order; a failure on any rank ends them all."""

import datetime
import os
import sys

import pytest
import torch
import torch.distributed as dist


def pytest_configure(config):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))


def pytest_sessionfinish(session, exitstatus):
    session.config.exitstatus = int(exitstatus)


def pytest_unconfigure(config):
    """After the report is written: leaves at once where a test has failed."""
    if status := getattr(config, "exitstatus", 1):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    dist.destroy_process_group()


def pytest_report_header(config):
    return f"rank {dist.get_rank()} of {dist.get_world_size()}, torch.distributed on Gloo"


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(1234)
