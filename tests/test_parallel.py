"""Runs the suite in tests/parallel on real ranks: Horovod on MPI and on Gloo, 2 and 3 of them."""

import pytest
from launching import start

pytestmark = pytest.mark.ranks

# Seconds; a hang must not outlive it. Twice what three ranks on Gloo take on two slow cores; tests
# on the ranks have limits of their own.
TIME_LIMIT = 900

# What shows on two ranks on Gloo and on three on MPI what it would show on three on Gloo, which
# take longest: whole programs, long statistics, what is computed and not how ranks talk. That is
# in test_communicators.py, on all.
COMPUTED = (
    "test_averaged_weights.py",
    "test_checkpoint.py",
    "test_dropin_arguments.py",
    "test_elastic_state.py",
    "test_examples.py",
    "test_hooks.py",
    "test_layouts.py",
    "test_neumann.py",
    "test_noise.py",
    "test_observe.py",
    "test_prototype_figures.py",
)
ELSEWHERE = {(3, "gloo"): COMPUTED, (2, "gloo"): ("test_noise.py", "test_prototype_figures.py")}


def launch(file, *options, ranks, controller, limit=TIME_LIMIT, hosts=None):
    """Runs a part of the suite on real ranks; returns the exit code and the output."""
    words = ["-x", "-q", "-p", "no:cacheprovider", file, *options]
    return start(
        "pytest",
        *words,
        ranks=ranks,
        controller=controller,
        hosts=hosts,
        limit=limit,
        HOROVOD_STALL_CHECK_TIME_SECONDS="20",
        HOROVOD_DYNAMIC_PROCESS_SETS=str(int(hosts is not None)),
    )


def test_suite_fails_when_one_rank_fails():
    """The harness itself: a failing test on the last rank alone must fail the whole run."""
    code, output = launch("tests/parallel/failing.py", ranks=2, controller="gloo", limit=120)
    assert code != 0, output[-4000:]
    assert "only on the last rank" in output


@pytest.mark.timeout(180)
def test_one_rank_under_the_launcher():
    """What differs for a rank alone: its noise is measured from micro-batches, if there are any.

    And nothing is reduced before hooks fire.
    """
    files = [f"tests/parallel/test_{name}.py" for name in ("noise", "observe", "hooks")]
    code, output = launch(*files, ranks=1, controller="gloo", limit=120)
    assert code == 0, output[-8000:]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("controller", "hosts", "tests"),
    [("mpi", None, "default_settings"), ("gloo", "localhost:2,127.0.0.1:2", "nodes")],
)
def test_two_groups_of_two_ranks(controller, hosts, tests):
    """This machine under two names is two nodes to Horovod on Gloo."""
    file = "tests/parallel/test_shard_groups.py"
    code, output = launch(file, "-k", tests, ranks=4, controller=controller, limit=180, hosts=hosts)
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
    left_out = [
        f"--ignore=tests/parallel/{file}" for file in ELSEWHERE.get((ranks, controller), ())
    ]
    code, output = launch("tests/parallel", *left_out, ranks=ranks, controller=controller)
    print(output[-3000:])
    assert code == 0, output[-8000:]
    assert output.count(" passed") >= ranks, "a rank ran no tests"
