"""The moving average and its criterion (Eq. 11, 15) against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aadl_hvd.core import chunking
from aadl_hvd.core.moving_average import MovingAverage


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 14), st.integers(0, 2**32))
def test_mean_and_spread(window, rows, pushes, seed):
    random = np.random.default_rng(seed)
    average = MovingAverage(window, rows, torch.float64, torch.device("cpu"))
    recent = []
    for k in range(pushes):
        w = random.standard_normal(rows)
        average.push(torch.from_numpy(w))
        recent = [*recent, w][-window:]
        if k % 5 == 4:  # the newest iterate gives way to something else
            recent[-1] = random.standard_normal(rows)
            average.replace_last(torch.from_numpy(recent[-1]))
        if k == 8:
            average.clear()
            recent = []
        assert average.full == (len(recent) == window)
        if average.full:
            np.testing.assert_allclose(average.mean(), np.mean(recent, axis=0), atol=1e-14)
            square_of_mean = np.mean(recent, axis=0) ** 2
            S = np.mean(np.square(recent), axis=0) - square_of_mean  # Eq. 15, as printed
            assert float(average.spread()) == pytest.approx(np.sqrt(S.max()), rel=1e-9)


def test_spread_does_not_cancel():
    """Weights near 1000 that move by 0.001, in float32: Eq. 15 as printed gives garbage there."""
    average = MovingAverage(2, 3, torch.float32, torch.device("cpu"))
    average.push(torch.full((3,), 1000.0))
    average.push(torch.full((3,), 1000.0) + 2 * 2**-10)
    assert float(average.spread()) == pytest.approx(2**-10, rel=1e-3)


def test_no_rows():
    average = MovingAverage(2, 0, torch.float32, torch.device("cpu"))
    for _ in range(2):
        average.push(torch.zeros(0))
    assert float(average.spread()) == 0.0
    assert average.mean().shape == (0,)


def test_bytes():
    assert MovingAverage(3, 5, torch.float32, torch.device("cpu")).nbytes == 3 * 5 * 4


@pytest.mark.parametrize("row", [0, 3, 6])
def test_spread_is_the_largest_of_all_chunks(monkeypatch, row):
    monkeypatch.setattr(chunking, "CHUNK", 2)
    average = MovingAverage(2, 7, torch.float64, torch.device("cpu"))
    for value in (1.0, 3.0):
        w = torch.zeros(7, dtype=torch.float64)
        w[row] = value
        average.push(w)
    assert float(average.spread()) == 1.0
