"""Rendered scripts at work: real ranks, under stand-ins for the schedulers and their launchers."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from launching import warm  # noqa: E402
from stand_ins import Cluster, run_script  # noqa: E402

from launch.__main__ import main  # noqa: E402
from launch.machines import FOLDER  # noqa: E402
from models.data import write_digits  # noqa: E402
from models.metrics import read_csv  # noqa: E402

pytestmark = pytest.mark.ranks

TRAIN = [
    "--model=resnet8", "--width=4", "--channels=1", "--image-size=16", "--resize=16", "--workers=1",
    "--batch-size=100", "--epochs=2", "--log-every=1", "--no-tensorboard", "--device=cpu",
    "--resume=auto", "--no-check-images", "--anderson=off",
]  # fmt: skip

JSRUN = ["jsrun", "-n", "1", "-r", "1", "-a", "2", "-g", "0", "-d", "packed"]

two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="needs two cores, to bind a rank to each"
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "o'digits $HOME", size=16)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    cluster = Cluster(tmp_path)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    python = cluster.programs / "python"  # of the ranks, not of the launchers
    python.write_text(f'#!/bin/sh\nexec {shlex.join(warm())} "$@"\n')
    python.chmod(0o755)
    return cluster


@pytest.fixture
def machine(tmp_path):
    """A copy of a machine file, cut down to this machine: two cores, two GPUs, a disk."""

    def machine(name):
        text = (FOLDER / f"{name}.toml").read_text()
        local = tmp_path / "bb"
        for key, value in {"gpus": 2, "cores": 2, "local_storage": f'"{local}"'}.items():
            text, changed = re.subn(rf"(?m)^{key} = \S+", f"{key} = {value}", text)
            assert changed == 1
        path = tmp_path / f"{name}.toml"
        path.write_text(text)
        return path

    return machine


def training(folder, data, stop_step):
    folder.mkdir(exist_ok=True)
    program = str(Path(__file__).with_name("trained.py"))
    return ["python", program, str(folder), str(stop_step), f"--data={data}",
            f"--out={folder}/out", *TRAIN]  # fmt: skip


def reports(folder, ranks=2):
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    assert len(list(folder.glob("rank*.json"))) == ranks
    return found


def check_layout(folder, *, bound=True):
    seen = reports(folder)
    assert [one["rank"] for one in seen] == [0, 1]
    assert [one["local_rank"] for one in seen] == [0, 1]
    assert {(one["size"], one["local_size"]) for one in seen} == {(2, 2)}
    if bound:
        assert [len(one["cores"]) for one in seen] == [1, 1]
        assert seen[0]["cores"] != seen[1]["cores"], "both ranks on one core"
    return seen


def check_interrupted(code, output, out):
    assert code == 75, output[-4000:]
    assert "stopped by a signal after step 3" in output
    assert [row["step"] for row in read_csv(out / "steps.csv")] == [1, 2, 3]
    assert (out / "last.pt").exists() and not (out / "summary.json").exists()


def check_finished(code, output, out):
    assert code == 0, output[-4000:]
    assert "going on after step 3" in output
    assert [row["step"] for row in read_csv(out / "steps.csv")] == list(range(1, 15))
    assert (out / "summary.json").exists()


@two_cores
def test_slurm_job_is_staged_bound_stopped_requeued_and_resumed(
    cluster, machine, digits, tmp_path, capsys
):
    archive = tmp_path / "it's $data.tar"
    subprocess.run(["tar", "-cf", archive, "-C", digits, "train", "val"], check=True)
    seen = tmp_path / "seen here"
    options = [
        "--machine",
        str(machine("frontier")),
        "--nodes",
        "1",
        "--walltime",
        "0:30",
        "--account",
        "ABC",
        "--stage",
        str(archive),
        "--env",
        'GREETING=it\'s $HOME; "x"',
    ]
    (tmp_path / "bb").mkdir()  # a node's own disk is there before a job
    assert main([*options, "--submit", "--", *training(seen, "{data}", 3)]) == 0
    assert capsys.readouterr().out == "job 4711\n"

    code, output, requeued = cluster.run(cwd=ROOT, until=seen / "waiting")
    check_interrupted(code, output, seen / "out")
    assert requeued
    for one in check_layout(seen):
        assert one["environment"] == {
            "OMP_NUM_THREADS": "1",
            "HOROVOD_FUSION_THRESHOLD": "134217728",
            "GREETING": 'it\'s $HOME; "x"',
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES"),
        }
        assert f"--data={tmp_path}/bb/it's $data" in one["arguments"]
    assert (cluster.state / "broadcast").exists()
    assert [path.name for path in (tmp_path / "bb").iterdir()] == ["it's $data"]

    shutil.rmtree(tmp_path / "bb")  # the next run may be on another node
    (tmp_path / "bb").mkdir()
    code, output, requeued = cluster.run(cwd=ROOT)
    check_finished(code, output, seen / "out")
    assert not requeued


@two_cores
def test_lsf_job_is_staged_bound_stopped_requeued_and_resumed(
    cluster, machine, digits, tmp_path, capsys
):
    seen = tmp_path / "seen"
    options = ["--machine", str(machine("summit")), "--nodes", "1", "--walltime", "0:30",
               "--account", "ABC", "--stage", str(digits)]  # fmt: skip
    assert main([*options, "--submit", "--", *training(seen, "{data}", 3)]) == 0
    assert capsys.readouterr().out == "job 4711\n"

    code, output, requeued = cluster.run(cwd=ROOT, until=seen / "waiting")
    check_interrupted(code, output, seen / "out")
    assert requeued
    for one in check_layout(seen):
        assert f"--data={tmp_path}/bb/{digits.name}" in one["arguments"]
        assert one["environment"]["CUDA_VISIBLE_DEVICES"] == "0,1", "a rank sees all GPUs"
    code, output, requeued = cluster.run(cwd=ROOT)
    check_finished(code, output, seen / "out")
    assert not requeued


@two_cores
def test_mpirun_script_is_bound_and_stopped(cluster, digits, tmp_path):
    seen, script = tmp_path / "seen", tmp_path / "job.sh"
    options = ["--machine", "mpirun", "--hosts", "localhost:2", "--cores-per-node", "2"]
    assert main([*options, "--output", str(script), "--", *training(seen, digits, 3)]) == 0
    code, output = run_script(
        script, cluster.environment, cwd=ROOT, until=seen / "waiting",
        warn=lambda process: process.send_signal(signal.SIGTERM),
    )  # fmt: skip
    check_interrupted(code, output, seen / "out")
    check_layout(seen)


def test_signal_is_not_lost_while_the_ranks_are_started(cluster, tmp_path):
    """It comes after they were started, and before the script knows their process."""
    launcher, script = cluster.programs / "mpirun", tmp_path / "job.sh"
    launcher.write_text("#!/bin/bash\ntrap 'exit 75' USR1\ntouch up\nfor i in {1..50}; do\n"
                        "    sleep 0.1\ndone\n")  # fmt: skip
    launcher.chmod(0o755)
    options = ["--machine", "mpirun", "--hosts", "localhost:1", "--output", str(script)]
    assert main([*options, "--", "true"]) == 0
    text, signalled = script.read_text(), "until [[ -e up ]]; do sleep 0.01; done; kill -USR1 $$\n"
    assert text.count("\nlaunch_ranks=$!\n") == 1
    script.write_text(text.replace("\nlaunch_ranks=$!", f"\n{signalled}launch_ranks=$!"))
    code, output = run_script(script, cluster.environment, cwd=tmp_path)
    assert code == 75, output


@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_horovodrun_script_starts_its_ranks(cluster, tmp_path, controller):
    program = tmp_path / "program.py"
    program.write_text(
        "import json, os, sys, horovod.torch as hvd\n"
        "hvd.init()\n"
        "seen = [hvd.rank(), hvd.local_rank(), hvd.size(), hvd.gloo_enabled(), sys.argv[1:],\n"
        "        os.environ['HOROVOD_CYCLE_TIME'], os.environ['OMP_NUM_THREADS']]\n"
        "open(f'{hvd.rank()}.json', 'w').write(json.dumps(seen))\n"
        "hvd.barrier()\n"
    )
    script = tmp_path / "job.sh"
    words = ["it's", "$HOME", "a  b", "{data}"]
    options = ["--machine", "horovodrun", "--hosts", "localhost:2", "--controller", controller]
    command = ["python", str(program), *words]
    assert main([*options, "--output", str(script), "--", *command]) == 0
    code, output = run_script(script, cluster.environment, cwd=tmp_path)
    assert code == 0, output[-4000:]
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert seen == [[rank, rank, 2, controller == "gloo", words, "1", threads] for rank in (0, 1)]


@pytest.mark.parametrize("name", ["frontier", "summit"])
def test_job_stopped_while_staging_neither_trains_nor_is_requeued(cluster, machine, tmp_path, name):
    """It would come no further the next time, and so for ever."""
    data, started = tmp_path / "data", tmp_path / "started"
    (data / "train").mkdir(parents=True)
    slow = cluster.programs / "cp"
    slow.write_text(f'#!/bin/sh\ntouch {started}\nsleep 2\nexec {shutil.which("cp")} "$@"\n')
    slow.chmod(0o755)
    options = ["--machine", str(machine(name)), "--nodes", "1", "--walltime", "0:30", "--submit",
               "--account", "ABC", "--ranks-per-node", "1", "--stage", str(data)]  # fmt: skip
    assert main([*options, "--", "touch", "{data}/trained"]) == 0
    code, output, requeued = cluster.run(cwd=tmp_path, until=started)
    assert code == 1 and not requeued, output
    launched = (cluster.state / "launched").read_text()
    assert "cp -R" in launched and "touch" not in launched


@pytest.mark.parametrize(("number", "again"), [(None, True), (signal.SIGTERM, False)])
def test_job_that_slurm_ends_does_not_queue_itself_again(cluster, machine, tmp_path, number, again):
    """SIGTERM comes when the user cancels the job, who would see it come back."""
    options = ["--machine", str(machine("frontier")), "--nodes", "1", "--walltime", "0:30",
               "--account", "ABC", "--ranks-per-node", "1", "--submit"]  # fmt: skip
    program = "trap 'exit 75' USR1; touch up; for i in {1..50}; do sleep 0.1; done"
    assert main([*options, "--", "bash", "-c", program]) == 0
    code, output, requeued = cluster.run(cwd=tmp_path, until=tmp_path / "up", number=number)
    assert code == 75 and requeued == again, output
    assert ("ended by SLURM" in output) == (not again)


@pytest.mark.parametrize("name", ["frontier", "summit"])
def test_job_that_fails_or_may_not_be_requeued_is_not(cluster, machine, tmp_path, name):
    options = ["--machine", str(machine(name)), "--nodes", "1", "--walltime", "0:30", "--submit",
               "--account", "ABC", "--ranks-per-node", "1"]  # fmt: skip
    assert main([*options, "--", "bash", "-c", "exit 3"]) == 0
    code, output, requeued = cluster.run(cwd=tmp_path)
    assert code == 3 and not requeued, output
    assert main([*options, "--no-requeue", "--", "bash", "-c", "exit 75"]) == 0
    code, output, requeued = cluster.run(cwd=tmp_path)
    assert code == 75 and not requeued, output


@pytest.mark.parametrize(
    "command",
    [
        ["srun", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--unknown", "true"],
        [*JSRUN, "-c", "2", "-b", "rs", "true"],
        [*JSRUN, "-c", "2", "-b", "packed:1", "true"],
        [*JSRUN, "-c", "4", "-b", "proportional-packed:1", "true"],
    ],
)
def test_stand_ins_refuse_what_they_do_not_know(cluster, command):
    (cluster.state / "job.json").write_text('{"nnodes": 1, "nodes": 1}')
    environment = dict(cluster.environment, SLURM_JOB_ID="4711")
    assert subprocess.run(command, env=environment, capture_output=True).returncode != 0
    head = "#!/bin/bash\n#SBATCH --nodes=1\n#SBATCH --open-mode=append\n#SBATCH --tasks=3\n"
    run = subprocess.run(["sbatch"], input=head, env=environment, text=True, capture_output=True)
    assert run.returncode == 2 and "--tasks" in run.stderr
