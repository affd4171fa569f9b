"""Before a training starts: what the history will take, and an error where it will not fit."""

import threading

import pytest
import torch
from problems import PLAIN, Problem

from aadl_hvd import AndersonConfig, AndersonOptimizer, HistoryMemoryError, accelerator, memory
from aadl_hvd.comm.simulated import run_ranks

CASES = {
    "default": {},
    "columns": {"layout": "columns"},
    "narrow": {"history_dtype": "float16"},
    "averages": {"averages": (0.9, 6)},
    "moving average": {"averages": (), "average_window": 3},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_said_is_what_is_taken(name, dtype):
    problem = Problem(PLAIN)
    config = AndersonConfig(history_depth=5, noise_gate=None, **CASES[name])

    def program(comm):
        opt = problem.optimizer(config, comm, dtype)
        said = opt.anderson.needed_bytes(opt._anderson_problem)
        problem.run(config, 8, opt=opt)
        return said, opt.anderson.history_bytes

    for said, taken in run_ranks(3, program):
        assert said == taken > 0


def test_more_than_this_machine_has():
    """160 GB: refused at once, and nothing was allocated."""
    weight = torch.nn.Parameter(torch.zeros(1_000_000))
    opt = torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(HistoryMemoryError, match=r"160 GB.*free.*history_depth=20000"):
        AndersonOptimizer(opt, anderson=AndersonConfig(history_depth=20_000, averages=()))
    AndersonOptimizer(opt)


def test_ranks_of_a_node_share_its_memory(monkeypatch):
    """Each would fit alone; the error is on all of them, those of another node included."""
    problem = Problem(PLAIN)
    config = AndersonConfig(history_depth=5)
    here = threading.local()
    most = 8 * 8 * (2 * 5 + 4 + 8)  # 8 of 23 rows
    monkeypatch.setattr(accelerator.memory, "place", lambda device: here.node)
    monkeypatch.setattr(accelerator.memory, "free_bytes", lambda device: here.free)

    def program(comm):
        here.node = "a node" if comm.rank < 2 else "another"
        here.free = 10**9
        opt = problem.optimizer(config, comm)
        here.free = most + 1
        needed = opt.anderson.needed_bytes(opt._anderson_problem)
        with pytest.raises(HistoryMemoryError, match="on rank 0"):
            opt.anderson.check_memory(opt._anderson_problem)
        return needed

    assert max(run_ranks(3, program)) == most


def test_free_memory_of_this_machine():
    free = memory.free_bytes(torch.device("cpu"))
    with open("/proc/meminfo") as file:
        total = 1024 * int(file.readline().split()[1])
    assert 0 < free <= total
    assert memory.free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize(("limit", "expected"), [("5000", 5000 - 3000 + 1000), ("max", None)])
@pytest.mark.parametrize(
    ("own", "limited"),
    [("/", "."), ("/jobs/7/step", "."), ("/jobs/7/step", "jobs/7"), ("/jobs/7", "jobs/7")],
)
def test_a_container_or_a_job_has_less(own, limited, limit, expected, tmp_path, monkeypatch):
    group = tmp_path / limited
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text("3000\n")
    (group / "memory.stat").write_text("anon 2000\ninactive_file 1000\n")
    (tmp_path / "cgroup").write_text(f"1:cpu:/elsewhere\n0::{own}\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUP", tmp_path / "cgroup")
    free = memory.free_bytes(torch.device("cpu"))
    assert free == expected if expected else free > 10**6
