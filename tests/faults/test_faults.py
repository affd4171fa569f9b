"""What befalls one rank ends the run on all, with its own message first; or it goes on, on all.

A run that hangs meets the time limit: that is the failure these tests are about.
"""

import re

import pytest
from launching import ROOT, start

PROGRAM = str(ROOT / "tests" / "faults" / "program.py")
LIMIT = 150
pytestmark = [pytest.mark.ranks, pytest.mark.timeout(LIMIT + 20)]

# Before what horovodrun forwards, also amid a line that came in two pieces.
OF_WHOM = re.compile(r"\[\d+(,\d+)?\]<std(out|err)>:")
SAID = re.compile(r"^rank \d says at ([\d.]+): (.*)", re.MULTILINE)
DAMAGED = "DamagedImage: image 7"
OWN = f"^{DAMAGED}"
ALL_MUST = r"All ranks must call step\(\)"

# Fault, ranks, controller; what is said first, and then by the others, where they have the time.
ENDS = [
    ("raises", 3, "mpirun", OWN, f"Rank 2 has left: {DAMAGED}"),
    ("raises", 2, "mpi", OWN, f"Rank 1 has left: {DAMAGED}"),
    ("raises", 2, "gloo", OWN, "Horovod has been shut down"),
    ("closure raises", 2, "mpirun", OWN, f"Rank 1 has left: {DAMAGED}"),
    ("data ends", 2, "mpirun", "Rank 1 has left: its program has ended", None),
    ("leaves", 3, "mpirun", "Rank 2 has left: its program has ended", None),
    ("exits", 2, "mpirun", None, None),
    ("is killed", 2, "gloo", None, None),
    ("is killed amid the step", 2, "mpirun", None, None),
    ("raises amid the gathering", 3, "mpirun", OWN, f"Rank 2 has left: {DAMAGED}"),
    ("shuts down", 2, "mpirun", "MPI is shut down", None),
    ("skips", 2, "mpirun", f"Rank 0 waits for this rank, 1, .*{ALL_MUST}", "Rank 1 has left"),
    ("scaler alone", 2, "mpirun", "AssertionError: .*zero_grad", "Rank 1 has left: Assertion"),
    ("averages alone", 2, "mpirun", f"Rank 0 waits for this rank, .*{ALL_MUST}", "Rank 1 has left"),
    ("consolidates alone", 2, "mpirun", f"Rank 0 waits for this rank, .*{ALL_MUST}", "Rank 1 has"),
    ("adds a group", 3, "mpirun", "Rank 1 waits for the gradients of a later step", "Rank 2 has"),
    ("joins", 3, "mpirun", r"Rank 2 has called hvd.join\(\)\. This rank", None),
    ("joins", 2, "gloo", r"Another rank has called hvd.join\(\)", None),
    (
        "another rate",
        2,
        "mpirun",
        r"rank 1 has group 0: lr=0.07, rank 0 has group 0: lr=0.05",
        None,
    ),
    ("mixes", 2, "mpirun", f"is in its operation .*{ALL_MUST}", None),
    ("mixes", 2, "gloo", f"Ranks are in different operations: .*{ALL_MUST}", None),
]


@pytest.mark.parametrize(("fault", "ranks", "controller", "first", "then"), ENDS)
def test_the_run_ends_on_all_ranks(fault, ranks, controller, first, then):
    code, output = start(PROGRAM, fault, ranks=ranks, controller=controller, limit=LIMIT)
    assert code != 0, output
    assert f"{fault} at" in output, output
    assert " steps, " not in output, "it went on"
    assert "after MPI_FINALIZE" not in output, output
    said = sorted((float(at), words) for at, words in SAID.findall(OF_WHOM.sub("", output)))
    places = []
    for wanted in filter(None, (first, then)):
        found = [i for i, (_, words) in enumerate(said) if re.search(wanted, words)]
        assert found, output
        places.append(found[0])
    assert places == sorted(set(places)), output


@pytest.mark.parametrize("fault", ["scaler", "is late"])
def test_the_run_goes_on_on_all_ranks(fault):
    """Late is more than the second after which a rank asks another one where it is."""
    code, output = start(PROGRAM, fault, ranks=3, controller="mpirun", limit=LIMIT)
    assert code == 0, output
    assert f"{fault} at" in output, output
    assert "16 steps" in output and "replicas are equal" in output, output


@pytest.mark.parametrize("controller", ["mpirun", "gloo"])
def test_a_group_that_is_done_does_not_end_the_gathering_of_another(controller):
    """The first rank that exits ends Horovod on all, in whatever gathering they are."""
    program = str(ROOT / "tests" / "faults" / "last_gathering.py")
    code, output = start(program, ranks=4, controller=controller, limit=LIMIT)
    assert output.count("is late") == 1, output
    assert code == 0, output
    assert len(re.findall("ends after [1-9] accelerated", output)) == 4, output
