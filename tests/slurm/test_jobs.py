"""Jobs on a real Slurm: what the launcher finds out about it, and what users see in the output."""

import json
import os
import re
import time
from pathlib import Path

import cluster
import pytest
from launching import ROOT
from slurm_jobs import TRAIN

pytestmark = [pytest.mark.ranks, pytest.mark.slurm]

FAILING = str(ROOT / "tests" / "models" / "failing.py")
PLUGINS = "/usr/lib/*-linux-gnu/slurm-wlm/*.so"


@pytest.fixture(scope="module")
def plain(start_slurm):
    """As Slurm is without settings: srun speaks no PMIx unless told, and binds no rank."""
    return start_slurm(MpiDefault="none", TaskPlugin="task/none")


@pytest.fixture(scope="module")
def without_pmix(start_slurm, tmp_path_factory):
    """A Slurm that was built without PMIx."""
    folder = tmp_path_factory.mktemp("plugins")
    for plugin in Path("/").glob(PLUGINS.removeprefix("/")):
        if "pmix" not in plugin.name:
            (folder / plugin.name).symlink_to(plugin)
    return start_slurm(MpiDefault="none", PluginDir=folder)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(cluster, "which", lambda program: None if program == "munged" else "there")
    assert cluster.missing() == "root and Debian's munge (apt-get install)"
    monkeypatch.setattr(cluster, "which", lambda program: "there")
    monkeypatch.setattr(cluster, "PMIX", "no/such.so")
    assert cluster.missing() == "root and Debian's libpmix-dev (apt-get install)"


def training(digits, out, *options, epochs=2):
    return ["-m", "models.train", *TRAIN, f"--data={digits}", f"--out={out}",
            f"--epochs={epochs}", *options]  # fmt: skip


def test_job_trains_on_two_ranks(plain, jobs_on, digits, tmp_path):
    jobs = jobs_on(plain)
    done = jobs.launch(command=["python", *training(digits, tmp_path / "out", epochs=1)])
    assert done.returncode == 0, done.stderr
    assert "note: srun gets --mpi=pmix: this Slurm's own choice is none" in done.stderr
    assert "note: ranks are not bound to cores: this Slurm's TaskPlugin is none" in done.stderr
    output = jobs.end(int(done.stdout.split()[1]), "COMPLETED")
    assert "2 ranks on cpu" in output and "srun" not in output, output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 7


def test_failing_rank_says_its_error_first(plain, jobs_on, digits, tmp_path):
    jobs = jobs_on(plain)
    jobs.fork()
    command = ["python", FAILING, "1", "3", *training(digits, tmp_path / "out")[2:]]
    output = jobs.end(jobs.submit(command=command), "FAILED")
    said = "rank 1 ends because of this error; what follows is said by srun, and by other ranks"
    ended = re.search(r"srun: error: n\d: tasks? .*: Exited with exit code 1", output)
    assert output.index("RuntimeError: a bug") < output.index(said) < ended.start()
    assert "requeued" not in output


def test_cancelled_job_leaves_a_checkpoint_and_does_not_come_back(plain, jobs_on, digits, tmp_path):
    jobs, out = jobs_on(plain), tmp_path / "out"
    jobs.fork()
    job = jobs.submit(command=["python", *training(digits, out, epochs=1000)])
    plain.wait(job, "RUNNING")
    end = time.monotonic() + 60
    while not (out / "steps.csv").exists():
        assert time.monotonic() < end, jobs.output(job)
        time.sleep(0.1)
    plain.run("scancel", str(job))
    jobs.end(job, "CANCELLED")
    plain.wait_for_nodes("idle", limit=60)  # only then a job that was requeued is seen
    assert plain.job(job)["JobState"] == "CANCELLED"
    output = jobs.output(job)
    assert "CANCELLED AT" in output
    assert "stopped by a signal after step" in output and (out / "last.pt").exists()
    assert "ended by SLURM; unless SLURM queues it again itself, submit it again" in output
    assert "; requeued" not in output


def test_too_little_memory_is_named(plain, jobs_on):
    hungry = "import time; held = bytearray(300 << 20); time.sleep(60)"
    jobs = jobs_on(plain)
    job = jobs.submit("--directive=--mem=100", command=["python", "-c", hungry])
    output = jobs.end(job, "FAILED", "OUT_OF_MEMORY")
    assert "exceeded memory limit" in output and "being killed" in output
    assert "> 104857600" in output, "the limit in bytes"


def test_without_pmix_nothing_is_submitted_and_mpirun_does_it(
    without_pmix, jobs_on, digits, tmp_path
):
    jobs = jobs_on(without_pmix)
    jobs.fork()
    command = ["python", *training(digits, tmp_path / "out", epochs=1)]
    refused = jobs.launch(command=command)
    assert refused.returncode == 2 and not refused.stdout
    assert refused.stderr.startswith("error: this Slurm has no MPI type 'pmix' that works")
    assert "MpiDefault is none. Add --launcher mpirun" in refused.stderr
    assert not without_pmix.run("squeue", "--noheader")
    output = jobs.end(jobs.submit("--launcher=mpirun", command=command), "COMPLETED")
    assert "2 ranks on cpu" in output
