"""torchrun in a job of a real Slurm: it is asked to stop, is requeued, and ends."""

import time

import pytest
from launching import ROOT

pytestmark = [pytest.mark.ranks, pytest.mark.slurm]

PROGRAM = str(ROOT / "tests" / "slurm" / "stopped.py")


@pytest.fixture(scope="module")
def slurm(start_slurm):
    return start_slurm(MpiDefault="none", TaskPlugin="task/none")


@pytest.fixture
def stopped(slurm, jobs_on):
    """stopped(ranks, option ...): the jobs and the number of one that was asked to stop."""
    jobs = jobs_on(slurm)
    jobs.fork()

    def stopped(ranks, *options):
        job = jobs.submit("--launcher=torchrun", *options, command=["python", PROGRAM])
        for rank in range(ranks):
            wait_for(jobs, job, f"rank {rank} of {ranks}, restarts: 0")
        slurm.run("scancel", "--batch", "--signal=USR1", str(job))
        for rank in range(ranks):
            wait_for(jobs, job, f"rank {rank} stops")
        return jobs, job

    return stopped


def test_a_request_to_stop_reaches_the_ranks(slurm, stopped):
    jobs, job = stopped(2, "--no-requeue")
    jobs.end(job, "FAILED")
    assert slurm.job(job)["ExitCode"] == "75:0"


@pytest.mark.long
def test_a_job_on_two_nodes_is_requeued(stopped):
    jobs, job = stopped(4, "--nodes=2")
    wait_for(jobs, job, "stopped before its end; requeued")
    output = jobs.end(job, "COMPLETED", limit=300)
    for rank in range(4):
        assert f"rank {rank} of 4, restarts: 1" in output, output


def wait_for(jobs, job, text, limit=120):
    end = time.monotonic() + limit
    while text not in jobs.output(job):
        assert time.monotonic() < end, f"no {text!r}:\n{jobs.output(job)[-6000:]}"
        time.sleep(0.1)
