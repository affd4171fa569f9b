"""Runs the suite in tests/parallel on real ranks: Horovod on MPI and on Gloo, 2 and 3 of them."""

import re

import pytest
from launching import ROOT, start

pytestmark = pytest.mark.ranks

# Seconds; a hang must not outlive it. Twice what three ranks on Gloo take on two slow cores; tests
# on the ranks have limits of their own.
TIME_LIMIT = 900

PARALLEL = ROOT / "tests" / "parallel"
ALL = sorted(path.name for path in PARALLEL.glob("test_*.py"))


def files(names):
    found = [f"test_{name}.py" for name in names.split()]
    assert set(found) <= set(ALL)
    return found


# Two ranks on MPI run every file. Elsewhere run those about what differs there:
FILES = {
    (2, "mpi"): ALL,
    # How many ranks there are: whose part is where, sums of three, one of two who differ.
    (3, "mpi"): files(
        "averaged_weights bad_numbers checkpoint communicators dropin dropin_accelerated"
        " errors layouts observe replicas resume shard_groups"
    ),
    # What reduces: other collectives and other errors, no Adasum, elastic runs.
    (2, "gloo"): files(
        "bad_numbers communicators disabled dropin dropin_accelerated elastic_state errors hooks"
        " observe replicas resume subspace"
    ),
    (3, "gloo"): files("communicators errors layouts replicas"),
}


def launch(*words, ranks, controller, limit=TIME_LIMIT, hosts=None):
    """Runs a part of the suite on real ranks; returns the exit code and the output."""
    return start(
        "pytest",
        *("-x", "-q", "-p", "no:cacheprovider", *words),
        ranks=ranks,
        controller=controller,
        hosts=hosts,
        limit=limit,
        forked=False,  # ranks as they are: imports of their own, sets in an order of their own
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
    [
        pytest.param("mpi", None, "default_settings", marks=pytest.mark.long),
        ("gloo", "localhost:2,127.0.0.1:2", "nodes"),
    ],
)
def test_two_groups_of_two_ranks(controller, hosts, tests):
    """This machine under two names is two nodes to Horovod on Gloo."""
    file = "tests/parallel/test_shard_groups.py"
    code, output = launch(file, "-k", tests, ranks=4, controller=controller, limit=180, hosts=hosts)
    assert code == 0, output[-8000:]
    assert output.count("1 passed") == 4, output[-8000:]


@pytest.mark.timeout(180)
def test_steps_have_nothing_to_negotiate():
    """Whatever the lengths and kinds of small vectors that they send through Horovod."""
    code, output = start(
        "tests/parallel/negotiations.py",
        ranks=2,
        controller="gloo",
        limit=120,
        HOROVOD_LOG_LEVEL="trace",
    )
    assert code == 0, output[-8000:]
    whole = "".join(line for line in output.splitlines() if line.startswith("[1]<stdout>:"))
    assert "messages to coordinator" in whole, "Horovod no longer says so"
    for method, least in (("subspace", 8), ("residual", 40)):
        steps = re.search(rf"{method} begins(.*){method} ends, accelerated [1-9]", whole)[1]
        assert len(re.findall(r"Performing allreduce\S+\.small", steps)) >= least
        assert "messages to coordinator" not in steps, method


def run_suite(ranks, controller, *words):
    import horovod.torch as hvd

    built = hvd.mpi_built() if controller == "mpi" else hvd.gloo_built()
    if not built:
        pytest.skip(f"this Horovod was built without {controller}")
    code, output = launch(*words, ranks=ranks, controller=controller)
    print(output[-3000:])
    assert code == 0, output[-8000:]
    assert output.count(" passed") >= ranks, "a rank ran no tests"


@pytest.mark.timeout(TIME_LIMIT + 60)
@pytest.mark.parametrize(("ranks", "controller"), FILES)
def test_parallel_suite(ranks, controller):
    paths = [f"tests/parallel/{file}" for file in FILES[ranks, controller]]
    run_suite(ranks, controller, "-m", "not long", *paths)


@pytest.mark.long
@pytest.mark.timeout(TIME_LIMIT + 60)
@pytest.mark.parametrize(("ranks", "controller"), FILES)
def test_what_the_parallel_suite_leaves_out(ranks, controller):
    """On two ranks on MPI the long tests, on others the files that run only there."""
    others = sorted(set(ALL) - set(FILES[ranks, controller]))
    words = [f"tests/parallel/{file}" for file in others] or ["-m", "long", "tests/parallel"]
    run_suite(ranks, controller, *words)
