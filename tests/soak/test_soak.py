"""The short form of the soak: every fault once, and the weights of a run without interruptions."""

import pytest

from tests.soak import plan, soak


@pytest.mark.soak
@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_interrupted_training_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    ends = {}
    for faults in (False, True):
        folder = tmp_path / str(faults)
        folder.mkdir()
        launches, end, looks = soak.train(
            400, ranks=2, controller="mpi", seed=1, folder=folder, faults=faults, limit=120
        )
        soak.check(end, looks)
        ends[faults] = end["digests"]
        if faults:
            assert {x["fault"] for x in launches} == {*plan.ENDS, None}
    assert ends[True] == ends[False]
