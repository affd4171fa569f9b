"""Shared by all tests.

Tests in tests/parallel run only under a launcher (test_parallel.py), those in tests/ddp under
torchrun (test_ddp.py).
"""

import os

import torch
from hypothesis import settings

# Ranks, worker processes and pytest share two cores; one thread each is fastest and repeatable.
torch.set_num_threads(1)

# Before Triton is imported: without a GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("default")

MARKERS = {
    "ranks": "starts ranks, and needs the cores for itself: not beside other tests",
    "long": "statistics, or a repetition of what a shorter test shows: make test-long",
    "slurm": "runs jobs on a Slurm of its own, where its packages and root are: make test-slurm",
    "soak": "many steps through random faults: make soak",
}


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


UNDER_LAUNCHER = any(v in os.environ for v in ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
collect_ignore = ["parallel"] * (not UNDER_LAUNCHER) + ["ddp"] * (not UNDER_TORCHRUN)
