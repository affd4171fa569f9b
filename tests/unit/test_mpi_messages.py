"""Headers of messages and the shape of the tree: what needs no MPI."""

import pytest

from aadl_hvd import CommunicationError
from aadl_hvd.comm.messages import (
    KINDS,
    NO_OPERATION,
    PER_OPERATION,
    in_words,
    kind_and_length,
    operation_number,
    refuse,
)
from aadl_hvd.comm.tree import parent_and_children


@pytest.mark.parametrize("number", [1, 2, 12_345, 2**27 - 1])
def test_headers_tell_operations_apart(number):
    found = {}
    for kind in KINDS:
        for length in (0, 1, 440, 2**24 - 1):
            header = kind_and_length(kind, length) + number * PER_OPERATION
            assert operation_number(header) == number
            assert in_words(header) == f"its operation {number}, a {kind} of {length} numbers"
            found[header] = kind, length
    assert len(found) == 16
    assert operation_number(NO_OPERATION) == 0


def test_a_refusal_names_both_ranks_and_both_operations():
    there = kind_and_length("broadcast", 3) + 14 * PER_OPERATION
    here = kind_and_length("sum", 440) + 15 * PER_OPERATION
    words = r"Rank 5 .* 14, a broadcast of 3 numbers\. .* 2, is in .* 15, a sum of 440 numbers\."
    with pytest.raises(CommunicationError, match=words):
        refuse(5, there, 2, here)


@pytest.mark.parametrize("size", range(1, 34))
def test_every_rank_is_reached_once_and_in_few_rounds(size):
    tree = {rank: parent_and_children(rank, size) for rank in range(size)}
    reached, depth = {0}, {0: 0}
    for rank in range(size):  # a parent comes before its children
        parent, children = tree[rank]
        assert (parent is None) == (rank == 0)
        assert children == sorted(children)
        for child in children:
            assert child not in reached and tree[child][0] == rank
            reached.add(child)
            depth[child] = depth[rank] + 1
    assert reached == set(range(size))
    rounds = (size - 1).bit_length()
    assert max(depth.values()) <= rounds and len(tree[0][1]) == rounds
