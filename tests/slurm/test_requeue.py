"""Jobs that Slurm stops and queues again. It waits two minutes until it starts one again."""

import json
import re
import time

import pytest
import torch
from cluster import NODES
from launching import ROOT
from slurm_jobs import TRAIN

from models.metrics import read_csv

pytestmark = [pytest.mark.ranks, pytest.mark.slurm, pytest.mark.long]

TRAINED = str(ROOT / "tests" / "launch" / "trained.py")
MACHINE = ROOT / "launch" / "machines" / "slurm.toml"
# History and all: columns are stored and used from the first steps on.
ACCELERATED = ("--anderson=default", "--anderson-frequency=3", "--anderson-noise-gate=0")
REQUEUED = 240  # seconds until a requeued job has ended


@pytest.fixture(scope="module")
def slurm(start_slurm):
    return start_slurm()


@pytest.fixture
def jobs(slurm, jobs_on):
    jobs = jobs_on(slurm)
    jobs.fork()
    return jobs


def trained(folder, data, *, stop_step=0, epochs=2):
    """The command of a training that waits after a step until it is asked to stop."""
    folder.mkdir()
    return ["python", TRAINED, str(folder), str(stop_step), *TRAIN, *ACCELERATED,
            f"--data={data}", f"--out={folder}/out", f"--epochs={epochs}"]  # fmt: skip


def wait_for(path, jobs, job, limit=60):
    end = time.monotonic() + limit
    while not path.exists():
        assert time.monotonic() < end, jobs.output(job)
        time.sleep(0.1)


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict | list | tuple):
        assert len(one) == len(other)
        keys = one if isinstance(one, dict) else range(len(one))
        for key in keys:
            assert_same(one[key], other[key])
    else:
        assert one == other or (one != one and other != other)


@pytest.mark.timeout(600)
def test_job_near_its_time_limit_is_requeued_and_resumes_bit_for_bit(slurm, jobs, digits, tmp_path):
    """The signal comes some time before the 30 seconds: Slurm looks at limits now and then."""
    machine = tmp_path / "short.toml"
    text = MACHINE.read_text()
    machine.write_text(text.replace("[scheduler]\n", "[scheduler]\nwarning_seconds = 30\n"))
    seen, straight = tmp_path / "seen", tmp_path / "straight"
    job = jobs.submit(
        f"--machine={machine}", "--walltime=2", command=trained(seen, digits, stop_step=5)
    )
    other = jobs.submit(command=trained(straight, digits))
    jobs.end(other, "COMPLETED")
    wait_for(seen / "waiting", jobs, job)
    slurm.wait(job, "PENDING", limit=120)
    assert slurm.job(job)["Restarts"] == "1"
    output = jobs.output(job)
    assert output.index("stopped by a signal after step 5") < output.index(
        "stopped before its end; requeued"
    )
    assert (seen / "out" / "last.pt").exists() and not (seen / "out" / "summary.json").exists()

    output = jobs.end(job, "COMPLETED", limit=REQUEUED)
    assert "going on after step 5" in output
    assert [row["step"] for row in read_csv(seen / "out" / "steps.csv")] == list(range(1, 15))
    states = [
        torch.load(folder / "out" / "last.pt", weights_only=True) for folder in (seen, straight)
    ]
    assert states[1]["optimizer"]["anderson"]["counters"]["accelerated"] > 0
    for part in ("model", "optimizer"):
        assert_same(states[0][part], states[1][part])
    ranks = [json.loads((straight / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["cores"] for rank in ranks] == [[0], [1]], "task/affinity binds each to a core"


@pytest.mark.timeout(600)
def test_job_goes_on_elsewhere_when_its_node_is_set_down(slurm, jobs, digits, tmp_path):
    seen = tmp_path / "seen"
    job = jobs.submit(command=trained(seen, digits, stop_step=10))
    wait_for(seen / "waiting", jobs, job)  # in the second epoch: there is a checkpoint
    node = slurm.job(job)["NodeList"]
    slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        slurm.wait(job, "PENDING", limit=60)
        output = jobs.end(job, "COMPLETED", limit=REQUEUED)
        assert slurm.job(job)["NodeList"] == next(name for name in NODES if name != node)
    finally:
        slurm.run("scontrol", "update", f"nodename={node}", "state=resume")
    # The node's own words come when it has ended the job, which the controller does not wait for.
    said = re.search(rf"JOB {job} ON {node} CANCELLED AT .* DUE TO NODE FAILURE", output)
    assert said and said.start() < output.index("going on after step"), output
    assert (seen / "out" / "summary.json").exists()


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_two_nodes_of_two_ranks(jobs, digits, tmp_path, launcher):
    # Both nodes are this host: their ranks would mistake each other's shared memory for their own.
    settings = ("--env=OMPI_MCA_btl=self,tcp", "--env=OMPI_MCA_pml=ob1")
    job = jobs.submit(
        "--nodes=2", f"--launcher={launcher}", *settings,
        command=trained(tmp_path / "seen", digits, epochs=1),
    )  # fmt: skip
    assert "4 ranks on cpu" in jobs.end(job, "COMPLETED")
    ranks = [json.loads((tmp_path / "seen" / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert [(rank["local_rank"], rank["local_size"]) for rank in ranks] == [(0, 2), (1, 2)] * 2
