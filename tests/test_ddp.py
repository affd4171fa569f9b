"""Runs the suite in tests/ddp under torchrun: DDP and FSDP2 on Gloo, on 2, 3 and 4 ranks."""

import pytest
from launching import ROOT, torchrun

pytestmark = pytest.mark.ranks

DDP = ROOT / "tests" / "ddp"
FSDP = f"{DDP / 'test_fsdp.py'}::test_fewer_rows_than_ranks"
TIME_LIMIT = 300  # seconds


@pytest.mark.timeout(TIME_LIMIT + 60)
@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (2, []),
        (3, [DDP / "test_communicators.py", DDP / "test_accelerated.py", FSDP]),
        (4, [DDP, "-k", "groups_that_share or copies_of_shards"]),
    ],
    ids=["2", "3", "4"],
)
def test_suite(ranks, words):
    options = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    code, output = torchrun(*options, *(words or [DDP]), ranks=ranks)
    print(output[-3000:])
    assert code == 0, output[-8000:]
    assert output.count(" passed") >= ranks, "a rank ran no tests"
