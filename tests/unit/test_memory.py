"""Before a training starts: what the history will take, and an error where it will not fit."""

import threading
import tracemalloc

import pytest
import torch
from problems import PLAIN, Problem

from aadl_hvd import AndersonConfig, AndersonOptimizer, HistoryMemoryError
from aadl_hvd.comm.local import LocalCommunicator
from aadl_hvd.comm.simulated import run_ranks
from aadl_hvd.core import memory
from aadl_hvd.core.chunking import CHUNK, CHUNK_WIDE
from aadl_hvd.core.fixed_point import work_dtype
from aadl_hvd.core.products import working_bytes
from aadl_hvd.core.sharding import Sharding

CASES = {
    "default": {},
    "columns": {"layout": "columns"},
    "narrow": {"history_dtype": "bfloat16"},
    "averages": {"averages": (0.9, 0.7)},
    "moving average": {"averages": (), "average_window": 3},
}


def needed(opt):
    problem, accelerator = opt.anderson_engine.problem, opt.anderson
    sharding = accelerator.share(problem.n)
    return memory.history_bytes(accelerator.config, sharding, work_dtype(problem))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_said_is_what_is_taken(name, dtype):
    problem = Problem(PLAIN)
    config = AndersonConfig(history_depth=5, noise_gate=None, **CASES[name])

    def program(comm):
        opt = problem.optimizer(config, comm, dtype)
        said = needed(opt)
        problem.run(config, 8, opt=opt)
        return said, opt.anderson.history_bytes

    for said, taken in run_ranks(3, program):
        assert said == taken > 0


def test_more_than_this_machine_has():
    """161 GB: refused at once, and nothing was allocated."""
    weight = torch.nn.Parameter(torch.zeros(20_000_000))
    opt = torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(HistoryMemoryError, match=r"161 GB.*free.*history_depth=1000"):
        AndersonOptimizer(opt, anderson=AndersonConfig(history_depth=1000, averages=()))
    AndersonOptimizer(opt)


def test_ranks_of_a_node_share_its_memory(monkeypatch):
    """Each would fit alone; the error is on all of them, those of another node included."""
    problem = Problem(PLAIN)
    config = AndersonConfig(history_depth=5, method="residual")
    here = threading.local()
    most = 8 * 8 * (2 * 5 + 4 + 6)  # 8 of 23 rows
    monkeypatch.setattr(memory, "place", lambda device: here.node)
    monkeypatch.setattr(memory, "free_bytes", lambda device: here.free)

    def program(comm):
        here.node = "a node" if comm.rank < 2 else "another"
        here.free = 10**9
        opt = problem.optimizer(config, comm)
        here.free = most + 1
        said = needed(opt)
        with pytest.raises(HistoryMemoryError, match="on rank 0"):
            opt.anderson.check_memory(opt.anderson_engine.problem)
        return said

    assert max(run_ranks(3, program)) == most


def test_free_memory_of_this_machine():
    free = memory.free_bytes(torch.device("cpu"))
    with open("/proc/meminfo") as file:
        total = 1024 * int(file.readline().split()[1])
    assert 0 < free <= total
    assert memory.free_bytes(torch.device("meta")) is None


# Files of a control group by version: limit, use, and memory.stat: 1,000 of a file read once, 600
# of one read again, 50 of the kernel's own; 300 of a file in memory alone, which stays.
GROUPS = {
    1: (
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        "inactive_file 1\ntotal_inactive_file 1000\ntotal_active_file 600\ntotal_shmem 300\n",
        1600,
    ),
    2: (
        ("memory.max", "memory.current"),
        "inactive_file 1000\nactive_file 600\nfile 1900\nshmem 300\nslab_reclaimable 50\n",
        1650,
    ),
}


def write_group(folder, version, limit):
    names, stat, reclaimable = GROUPS[version]
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, 3000), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 2000\n{stat}")
    return reclaimable


def free_in(tmp_path, monkeypatch, lines):
    (tmp_path / "cgroup").write_text(lines)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUP", tmp_path / "cgroup")
    return memory.free_bytes(torch.device("cpu"))


@pytest.mark.parametrize("version", GROUPS)
@pytest.mark.parametrize("limit", [5000, None])
@pytest.mark.parametrize(
    ("own", "limited"),
    [("/", "."), ("/jobs/7/step", "."), ("/jobs/7/step", "jobs/7"), ("/jobs/7", "jobs/7")],
)
def test_a_container_or_a_job_has_less(own, limited, limit, version, tmp_path, monkeypatch):
    top = tmp_path / "memory" if version == 1 else tmp_path
    none = {1: 2**63 - 4096, 2: "max"}[version]
    reclaimable = write_group(top / limited, version, none if limit is None else limit)
    kinds = {1: "7:cpu,memory", 2: "0:"}[version]
    free = free_in(tmp_path, monkeypatch, f"1:pids:/elsewhere\n{kinds}:{own}\n")
    assert free == limit - 3000 + reclaimable if limit is not None else free > 10**6


def test_limits_of_both_versions_hold(tmp_path, monkeypatch):
    """As under a batch system that limits by version 1, on a machine that mounts both."""
    write_group(tmp_path / "memory/slurm/job_1", 1, 9000)
    write_group(tmp_path / "slurm", 2, 8000)
    free = free_in(tmp_path, monkeypatch, "4:memory:/slurm/job_1/step_0\n0::/slurm\n")
    assert free == 8000 - 3000 + GROUPS[2][2]


def test_a_file_read_twice_is_no_reason_to_refuse(tmp_path, monkeypatch):
    """What a data set that was read twice holds of the page cache is free, as for the kernel."""
    weight = torch.nn.Parameter(torch.zeros(1000))
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("10000000\n")
    (folder / "memory.usage_in_bytes").write_text("9990000\n")
    (folder / "memory.stat").write_text("total_inactive_file 0\ntotal_active_file 9980000\n")
    assert free_in(tmp_path, monkeypatch, "4:memory:/\n") == 9990000
    AndersonOptimizer(torch.optim.SGD([weight], lr=0.1))


def test_what_the_solve_takes_is_in_the_forecast():
    """m x m matrices on the host: more than the history itself where m is near n."""
    m = 150
    weight = torch.nn.Parameter(torch.randn(m + 10, generator=torch.Generator().manual_seed(0)))
    config = AndersonConfig(
        history_depth=m, frequency=m + 5, noise_gate=None, safeguard="none", averages=()
    )
    opt = AndersonOptimizer(torch.optim.SGD([weight], lr=0.3), anderson=config)
    generator = torch.Generator().manual_seed(1)
    problem, host = opt.anderson_engine.problem, torch.device("cpu")
    for _ in range(m + 4):
        weight.grad = weight.detach() + torch.randn(len(weight), generator=generator)
        opt.step()
    tracemalloc.start()
    weight.grad = weight.detach().clone()
    opt.step()
    peak = tracemalloc.get_traced_memory()[1]  # of NumPy's arrays; not of what LAPACK works in
    tracemalloc.stop()
    assert opt.anderson.stats.accelerated == 1 and opt.anderson.columns == m
    beside = opt.anderson.forecast(problem)[host] - opt.anderson.history_bytes
    assert beside / 3 < peak < beside


def test_a_gpu_s_history_needs_memory_of_the_host_too(monkeypatch):
    """The matrices are always on the host: an error that names it, though the GPU has room."""
    config, sharding = AndersonConfig(history_depth=100), Sharding("rows", 23, 100, 1, 0)
    needed = memory.forecast(config, sharding, torch.float32, torch.device("cuda"), 1)
    free = {"cuda": 10**9, "cpu": 8 * 100**2}
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[device.type])
    monkeypatch.setattr(memory, "place", lambda device: f"memory of the {device.type}")
    with pytest.raises(HistoryMemoryError, match="on memory of the cpu"):
        memory.check_fits(needed, 100, LocalCommunicator())
    free["cpu"] = 10**9
    memory.check_fits(needed, 100, LocalCommunicator())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_columns_of_a_narrow_history_are_widened_by_the_chunk(device):
    """1,000 columns of bfloat16: 2 GB on a GPU without kernels, which grow with m alone."""
    sharding = Sharding("rows", 10**8, 1000, 1, 0)
    wide = working_bytes(sharding, torch.float32, torch.float32, torch.device(device), 2)
    narrow = working_bytes(sharding, torch.bfloat16, torch.float32, torch.device(device), 2)
    chunk = {"cpu": CHUNK, "cuda": CHUNK_WIDE}[device]
    assert 0 < wide < narrow and narrow >= 4 * 1000 * chunk
