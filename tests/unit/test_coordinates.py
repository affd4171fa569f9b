"""Numbers of a few tensors: which are drawn, what they stand for, and where they lie."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aadl_hvd.optim import coordinates
from aadl_hvd.optim.coordinates import Piece, draw

SIZES = st.lists(st.integers(0, 60), min_size=1, max_size=15)


@given(SIZES, st.integers(1, 9), st.integers(0, 8), st.integers(0, 99))
def test_each_piece_lies_in_one_tensor(sizes, ranks, rank, seed):
    rank %= ranks
    with mock.patch.multiple(coordinates, TENSORS=3, NUMBERS=90):
        pieces = draw(sizes, rank, ranks, seed)
        assert pieces == draw(sizes, rank, ranks, seed)
    met = [piece.index for piece in pieces]
    assert met == sorted(set(met)) and len(met) <= 3
    assert bool(met) == any(sizes)
    for piece in pieces:
        places = range(piece.start, sizes[piece.index], piece.stride)
        assert piece.count == len(places)
        assert piece.stride == 1 or math.gcd(piece.stride, sizes[piece.index]) == 1
    assert sum(piece.count for piece in pieces) <= 90
    few = sum(size > 0 for size in sizes) <= 3
    if few:
        assert met == [i for i, size in enumerate(sizes) if size]
    if few and sum(sizes) <= 90:
        assert [(p.start, p.stride, p.weight) for p in pieces] == [(0, 1, 1.0)] * len(met)


@settings(max_examples=25)
@given(SIZES, st.integers(1, 4), st.integers(0, 3), st.integers(0, 9))
def test_sums_over_the_draws_are_unbiased(sizes, ranks, rank, seed):
    """That of each tensor, for each rank: numbers that grow along the memory, and from tensor to
    tensor."""
    rank %= ranks
    values = [(1 + i) * (1.0 + np.arange(size)) for i, size in enumerate(sizes)]
    draws = 1500
    sums = np.zeros((draws, len(sizes)))
    with mock.patch.multiple(coordinates, TENSORS=3, NUMBERS=60):
        for k in range(draws):
            for p in draw(sizes, rank, ranks, 1000 * seed + k):
                sums[k, p.index] = p.weight * values[p.index][p.start :: p.stride].sum()
    wanted = np.array([own.sum() for own in values])
    # A tensor that is met once in 30 draws, by luck a third less often.
    error = 5.0 * sums.std(axis=0) / math.sqrt(draws) + 0.02 * wanted
    assert (abs(sums.mean(axis=0) - wanted) <= error).all(), (sums.mean(axis=0) / wanted, error)


def test_all_ranks_together_meet_more_tensors():
    sizes = [10_000 + i for i in range(60)]
    alone = {piece.index for piece in draw(sizes)}
    assert len(alone) == coordinates.TENSORS
    met = [piece.index for rank in range(4) for piece in draw(sizes, rank, 4)]
    assert len(set(met)) == len(met) == 4 * coordinates.TENSORS
    assert max(np.diff(sorted(met))) <= 3, "they are at equal distances"


def test_no_generator_of_the_program_is_touched():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    draw([5000] * 100)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def stored(kind):
    """A tensor [3, 4, 2, 5], and its numbers in the order of the memory."""
    whole = torch.arange(120.0).view(3, 4, 2, 5)
    if kind == "channels last":
        whole = whole.to(memory_format=torch.channels_last)
        return whole, whole.permute(0, 2, 3, 1).reshape(-1)
    if kind == "a part of another":
        return torch.arange(-7.0, 130.0)[7:127].view(3, 4, 2, 5), whole.reshape(-1)
    if kind == "transposed":
        return whole.transpose(0, 3).contiguous().transpose(0, 3), whole.reshape(-1)
    if kind == "with gaps":
        return torch.arange(240.0)[::2].view(3, 4, 2, 5), 2 * whole.reshape(-1)
    return whole.to_sparse() if kind == "sparse" else whole, whole.reshape(-1)


KINDS = "plain", "channels last", "a part of another", "transposed", "with gaps", "sparse"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "stride"), [(0, 1), (5, 7), (6, 7)])
def test_what_a_piece_reads(kind, start, stride):
    tensor, flat = stored(kind)
    expected = flat[start::stride]
    piece = Piece(0, start, stride, len(expected), 1.0)
    assert torch.equal(piece.of(tensor), expected)
