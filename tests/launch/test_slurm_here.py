"""What the launcher asks the Slurm that is here, and what it writes for it; under stand-ins."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from rendering import launched, script  # noqa: E402
from stand_ins import Cluster  # noqa: E402

from launch.__main__ import main  # noqa: E402

JOB = {"nodes": 1, "walltime": "1:00", "cores_per_node": 4, "ranks_per_node": 2}
OPTIONS = ["--machine=slurm", "--nodes=1", "--walltime=1:00", "--cores-per-node=4",
           "--ranks-per-node=2"]  # fmt: skip
COMMAND = ["--", "python", "train.py"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """here(...): a Slurm on PATH, see `Cluster`; and an mpirun of a kind, with its python."""

    def here(mpi="mpirun (Open MPI) 4.1.8", **about):
        cluster = Cluster(tmp_path, **about)
        for name, text in {"mpirun": f'echo "{mpi}"', "python": "exit 1"}.items():
            (cluster.programs / name).write_text(f"#!/bin/sh\n{text}\n")
            (cluster.programs / name).chmod(0o755)
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        return cluster

    return here


def submitted(cluster):
    return (cluster.state / "job.sh").read_text()


def no_difference(text):
    assert text == script("slurm", **JOB), "not the script of a machine without Slurm"


@pytest.mark.parametrize("default", ["pmix", "pmix_v4"])
def test_nothing_is_written_where_slurm_speaks_pmix_by_itself(here, capsys, default):
    cluster = here(MpiDefault=default, mpi_types=["none", "pmix", "pmix_v4"])
    assert main([*OPTIONS, "--submit", *COMMAND]) == 0
    assert capsys.readouterr().err == ""
    no_difference(submitted(cluster))


def test_pmix_is_asked_for_where_it_is_not_the_default(here, capsys):
    cluster = here(MpiDefault="none")
    assert main([*OPTIONS, "--submit", *COMMAND]) == 0
    assert "--mpi=pmix" in launched(submitted(cluster), "srun")
    assert capsys.readouterr().err == (
        "note: srun gets --mpi=pmix: this Slurm's own choice is none, which does not start this "
        "MPI\n"
    )
    no_difference(submitted(cluster).replace(" --mpi=pmix", ""))


REFUSED = {
    "not listed": {"MpiDefault": "none", "mpi_types": ["none", "pmi2"]},
    "listed and broken": {"MpiDefault": "none", "broken": ["pmix"]},
    "the default and broken": {"MpiDefault": "pmix", "broken": ["pmix"]},
}


@pytest.mark.parametrize("case", REFUSED)
def test_open_mpi_without_pmix_is_refused_before_submitting(here, capsys, case):
    cluster = here(**REFUSED[case])
    assert main([*OPTIONS, "--submit", *COMMAND]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: this Slurm has no MPI type 'pmix' that works, and Open MPI's")
    assert f"MpiDefault is {REFUSED[case]['MpiDefault']}. Add --launcher mpirun" in error
    assert not (cluster.state / "job.sh").exists()

    # Another Slurm may be meant, where the script is only written.
    assert main([*OPTIONS, *COMMAND]) == 0
    captured = capsys.readouterr()
    assert captured.err == error.replace("error: ", "note: ")
    no_difference(captured.out)

    assert main([*OPTIONS, "--submit", "--launcher=mpirun", *COMMAND]) == 0
    words = launched(submitted(cluster), "mpirun")
    assert words[:7] == ["mpirun", "-np", "2", "--map-by", "ppr:2:node:PE=2", "--bind-to", "core"]
    assert "-H" not in words and "srun" not in submitted(cluster).replace("by srun", "")


def test_another_mpi_is_left_to_slurm(here, capsys):
    cluster = here(mpi="HYDRA build details: Version: 4.2", MpiDefault="none", mpi_types=["none"])
    assert main([*OPTIONS, "--submit", *COMMAND]) == 0
    no_difference(submitted(cluster))
    assert capsys.readouterr().err == ""


def test_a_type_of_the_users_own_is_kept_if_it_works(here, capsys):
    cluster = here(MpiDefault="none")
    assert main([*OPTIONS, "--submit", "--env=SLURM_MPI_TYPE=pmi2", *COMMAND]) == 0
    assert "--mpi" not in submitted(cluster) and not capsys.readouterr().err
    assert main([*OPTIONS, "--submit", "--env=SLURM_MPI_TYPE=pmi9", *COMMAND]) == 2
    assert "no MPI type 'pmi9' that works, and it was asked for" in capsys.readouterr().err


def test_no_binding_is_asked_for_where_slurm_has_none(here, capsys):
    cluster = here(TaskPlugin="task/none")
    assert main([*OPTIONS, "--submit", *COMMAND]) == 0
    assert "not bound to cores: this Slurm's TaskPlugin is none" in capsys.readouterr().err
    assert "--cpu-bind" not in submitted(cluster)
    assert "--cpu-bind=cores" in launched(script("slurm", **JOB), "srun")


def test_gpus_that_nobody_asked_for_are_said(here, capsys):
    here(GresTypes="gpu,shard")
    assert main([*OPTIONS, *COMMAND]) == 0
    assert "this Slurm has GPUs, and the job asks for none" in capsys.readouterr().err
    assert main([*OPTIONS, "--gpus-per-node=4", *COMMAND]) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize("silent", ["srun", "scontrol"])
def test_a_slurm_that_does_not_answer_changes_nothing(here, capsys, silent):
    cluster = here(MpiDefault="none", TaskPlugin="task/none")
    (cluster.programs / silent).write_text("#!/bin/sh\nexit 1\n")
    assert main([*OPTIONS, *COMMAND]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    no_difference(captured.out)


def test_slurm_is_not_asked_for_other_schedulers(here, capsys):
    cluster = here()
    (cluster.state / "slurm.json").write_text(json.dumps({}))
    for name in ("srun", "scontrol"):
        (cluster.programs / name).write_text(f"#!/bin/sh\ntouch {cluster.state}/asked\n")
    assert main(["--machine=mpirun", "--hosts=a:2", *COMMAND]) == 0
    assert not (cluster.state / "asked").exists() and not capsys.readouterr().err


def test_old_srun_lists_types_after_its_name(here, monkeypatch):
    from launch import slurm

    cluster = here()
    said = "srun: MPI types are...\\nsrun: none\\nsrun: pmi2\\nsrun: pmix_v3"
    (cluster.programs / "srun").write_text(f'#!/bin/sh\nprintf "{said}\\n" >&2\n')
    assert slurm.ask().mpi_types == ("none", "pmi2", "pmix_v3")
    monkeypatch.setenv("PATH", str(cluster.state))
    assert slurm.ask() is None
