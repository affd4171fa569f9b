"""Runs the suite in tests/parallel on real ranks: Horovod on MPI and on Gloo, 2 and 3 of them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TIME_LIMIT = 420  # seconds; a hang must not outlive it


def launch(arguments, *, ranks, controller, time_limit=TIME_LIMIT, hosts=None):
    """Runs `python arguments` on real ranks; returns the exit code and the output."""
    binaries = Path(sys.executable).parent
    environment = dict(os.environ, OMP_NUM_THREADS="1", HOROVOD_STALL_CHECK_TIME_SECONDS="20")
    environment["PATH"] = f"{binaries}{os.pathsep}{environment['PATH']}"
    environment["HOROVOD_DYNAMIC_PROCESS_SETS"] = str(int(hosts is not None))
    command = [
        "horovodrun",
        "-np",
        str(ranks),
        f"--{controller}",
        *(["-H", hosts] if hosts else []),
    ]
    command += [sys.executable, *arguments]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=time_limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"no end after {time_limit} s\n{output[-6000:]}")
    return process.returncode, output


def test_suite_fails_when_one_rank_fails():
    """The harness itself: a failing test on the last rank alone must fail the whole run."""
    code, output = launch(
        ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/parallel/failing.py"],
        ranks=2,
        controller="gloo",
        time_limit=120,
    )
    assert code != 0, output[-4000:]
    assert "only on the last rank" in output


@pytest.mark.timeout(180)
def test_one_rank_under_the_launcher():
    """What differs for a rank alone: its noise is measured from micro-batches, if there are any."""
    files = ("tests/parallel/test_noise.py", "tests/parallel/test_observe.py")
    code, output = launch(
        ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files],
        ranks=1,
        controller="gloo",
        time_limit=120,
    )
    assert code == 0, output[-8000:]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("controller", "hosts", "tests"),
    [("mpi", None, "default_settings"), ("gloo", "localhost:2,127.0.0.1:2", "nodes")],
)
def test_two_groups_of_two_ranks(controller, hosts, tests):
    """This machine under two names is two nodes to Horovod on Gloo."""
    file = "tests/parallel/test_shard_groups.py"
    code, output = launch(
        ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", file, "-k", tests],
        ranks=4,
        controller=controller,
        time_limit=180,
        hosts=hosts,
    )
    assert code == 0, output[-8000:]
    assert output.count("1 passed") == 4, output[-8000:]


@pytest.mark.timeout(TIME_LIMIT + 60)
@pytest.mark.parametrize("controller", ["mpi", "gloo"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_parallel_suite(ranks, controller):
    import horovod.torch as hvd

    built = hvd.mpi_built() if controller == "mpi" else hvd.gloo_built()
    if not built:
        pytest.skip(f"this Horovod was built without {controller}")
    code, output = launch(
        ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/parallel"],
        ranks=ranks,
        controller=controller,
    )
    print(output[-3000:])
    assert code == 0, output[-8000:]
    assert output.count(" passed") >= ranks, "a rank ran no tests"
