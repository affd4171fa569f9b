"""What befalls one rank ends the run on all, with its own message first; or it goes on, on all.

A run that hangs meets the time limit: that is the failure these tests are about.
"""

import pytest
from launching import ROOT, start

PROGRAM = str(ROOT / "tests" / "faults" / "program.py")
LIMIT = 60
pytestmark = pytest.mark.timeout(LIMIT + 20)

HOROVOD = "Horovod has been shut down"
STEP_COUNTS = "All ranks must call step"

# fault, ranks, controller; what the rank itself says, and then the others, where there is time.
ENDS = [
    ("raises", 3, "mpirun", "DamagedImage: image 7", "Rank 2 has left: DamagedImage: image 7"),
    ("raises", 2, "mpi", "DamagedImage: image 7", "Rank 1 has left: DamagedImage: image 7"),
    ("raises", 2, "gloo", "DamagedImage: image 7", HOROVOD),
    (
        "raises after backward",
        2,
        "mpirun",
        "DamagedImage: image 7",
        "Rank 1 has left: DamagedImage",
    ),
    ("closure raises", 2, "mpirun", "DamagedImage: image 7", "Rank 1 has left: DamagedImage"),
    ("loader raises", 2, "mpirun", "DamagedImage: image 7", "Rank 1 has left: DamagedImage"),
    ("data ends", 2, "mpirun", None, "Rank 1 has left: its program has ended"),
    ("leaves", 3, "mpirun", None, "Rank 2 has left: its program has ended"),
    ("leaves", 2, "gloo", None, HOROVOD),
    ("exits", 2, "mpirun", None, None),
    ("is killed", 2, "gloo", None, None),
    ("is killed amid the step", 3, "mpirun", None, None),
    ("shuts down", 2, "mpirun", None, "MPI is shut down"),
    (
        "skips",
        2,
        "mpirun",
        f"Rank 0 waits for this one, rank 1, .* {STEP_COUNTS}",
        "Rank 1 has left",
    ),
    ("scaler alone", 2, "mpirun", "AssertionError: optimizer.zero_grad", "Rank 1 has left"),
    ("averages alone", 3, "mpirun", "Rank 0 waits for this one", "has left: CommunicationError"),
    ("mixes", 3, "mpirun", f"Rank 0 is in its .* {STEP_COUNTS}|Rank 2 is in its", "has left"),
    ("mixes", 2, "gloo", f"Ranks are in different operations: .*{STEP_COUNTS}", None),
]


@pytest.mark.parametrize(("fault", "ranks", "controller", "first", "then"), ENDS)
def test_the_run_ends_on_all_ranks(fault, ranks, controller, first, then):
    import re

    code, output = start(PROGRAM, fault, ranks=ranks, controller=controller, limit=LIMIT)
    assert code != 0, output
    assert f"{fault} at" in output, output
    assert " steps, " not in output, "it went on"
    assert "after MPI_FINALIZE" not in output, output
    places = [re.search(words, output) for words in (first, then) if words]
    assert all(places), output
    assert places == sorted(places, key=lambda place: place.start()), output


@pytest.mark.parametrize("fault", ["loss is NaN", "scaler", "is late"])
def test_the_run_goes_on_on_all_ranks(fault):
    """Late is more than the second after which a rank asks another one where it is."""
    code, output = start(PROGRAM, fault, ranks=3, controller="mpirun", limit=LIMIT)
    assert code == 0, output
    assert f"{fault} at" in output, output
    assert "16 steps" in output and "replicas are equal" in output, output
