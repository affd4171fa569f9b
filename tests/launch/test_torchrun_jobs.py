"""Job scripts for torchrun on Slurm; what a request to stop becomes in the agent of a node.

tests/slurm/test_torchrun_on_slurm.py has a real Slurm.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from rendering import launched, script  # noqa: E402

from launch.machines import LaunchError  # noqa: E402
from launch.torchrun import AGENT  # noqa: E402

JOB = {"nodes": 2, "walltime": "1:00", "cores_per_node": 8, "gpus_per_node": 4}


def of(machine="slurm", command=("python", "my.py", "--lr", "0.1"), **options):
    return script(machine, launcher="torchrun", command=command, **JOB | options)


def test_one_agent_a_node_has_all_of_it():
    words = launched(of(), "srun")
    assert words[: words.index("-c")] == [
        "srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=8",
        "--cpu-bind=cores", "--mpi=none", "--kill-on-bad-exit=0", "--wait=60", "--gpus-per-node=4",
        "python",
    ]  # fmt: skip
    assert words[words.index("-c") + 1 :] == [
        "$launch_agent", "--nnodes=2", "--nproc-per-node=4", "--rdzv-backend=c10d",
        "--rdzv-endpoint=$launch_head", "--rdzv-id=$SLURM_JOB_ID", "--no-python",
        "python", "my.py", "--lr", "0.1",
    ]  # fmt: skip


def test_the_job_itself_is_as_with_other_launchers():
    ours = [line for line in of().splitlines() if line.startswith("#SBATCH")]
    srun = script("slurm", command=("python", "my.py"), **JOB).splitlines()
    assert ours == [line for line in srun if line.startswith("#SBATCH")]
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  #" in of()
    assert "scontrol requeue" in of() and "scontrol requeue" not in of(requeue=False)


def test_the_agent_runs_on_the_python_of_the_program():
    assert "/env/bin/python3" in launched(of(command=("/env/bin/python3", "my.py")), "srun")
    words = launched(of(command=("my.sh",)), "srun")
    assert words[words.index("-c") - 1] == "python" and words[-1] == "my.sh"


@pytest.mark.parametrize("machine", ["frontier", "perlmutter"])
def test_options_of_srun_stay_with_srun(machine):
    """A machine file's options of its launcher bind GPUs to ranks, which srun does not start."""
    account = {"account": "ABC123", "cores_per_node": None, "gpus_per_node": None}
    assert "--gpu-bind" not in " ".join(launched(of(machine, **account), "srun"))


def test_a_training_on_horovod_is_refused():
    with pytest.raises(LaunchError, match=r"but models\.train reduces"):
        of(command=("python", "-m", "models.train"))


PROGRAM = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(int(sys.argv[1])))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.ranks
@pytest.mark.parametrize(("code", "expected"), [(75, 75), (3, 1), (0, 0)])
def test_the_agent_hands_the_signal_on_and_the_exit_code_back(tmp_path, code, expected):
    (tmp_path / "rank.py").write_text(PROGRAM)
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, "--standalone", "--nproc-per-node=2", "--no-python",
         sys.executable, tmp_path / "rank.py", str(code)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(os.environ, OMP_NUM_THREADS="1"),
    )  # fmt: skip
    said = b""
    while said.count(b"ready") < 2:
        said += (line := agent.stdout.readline())
        assert line, f"it has ended: {said.decode()}"
    agent.send_signal(signal.SIGUSR1)
    assert agent.wait(60) == expected


KEEPALIVE = re.compile(r"export OMPI_MCA_oob_tcp_keepalive_(\w+)=(\d+)")


def test_mpirun_looks_after_its_nodes():
    hosts = {"hosts": "a:2,b:2"}
    expected = {"time": "60", "intvl": "10", "probes": "6"}
    assert dict(KEEPALIVE.findall(script("mpirun", **hosts))) == expected
    assert dict(KEEPALIVE.findall(script("horovodrun", **hosts))) == expected
    assert not KEEPALIVE.search(script("horovodrun", **hosts, controller="gloo"))
    assert not KEEPALIVE.search(script("slurm", **JOB))
    assert dict(KEEPALIVE.findall(script("slurm", launcher="mpirun", **JOB))) == expected
    own = script("mpirun", **hosts, env=["OMPI_MCA_oob_tcp_keepalive_time=9"])
    assert dict(KEEPALIVE.findall(own)) == expected | {"time": "9"}
