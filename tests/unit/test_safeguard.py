"""The decisions, at and on either side of their limits."""

import math

import numpy as np
import pytest

from aadl_hvd.core.acceptance import (
    Backoff,
    Rejection,
    judge_loss,
    judge_residual,
    judge_system,
    judge_update,
)

GOOD = np.eye(2), np.ones(2)
BAD = [math.nan, math.inf, -math.inf]


def test_system():
    gram, b = GOOD
    assert judge_system(gram, b, 1.0) is None
    assert judge_system(gram, b, 0.0) is Rejection.DEGENERATE
    assert judge_system(0 * gram, b, 1.0) is Rejection.DEGENERATE
    for bad in BAD:
        assert judge_system(gram, b, bad) is Rejection.NONFINITE
        assert judge_system(gram, np.array([1.0, bad]), 1.0) is Rejection.NONFINITE
        assert judge_system(np.diag([bad, 1.0]), b, 1.0) is Rejection.NONFINITE
        assert judge_system(np.diag([bad, 1.0]), b, 0.0) is Rejection.NONFINITE


@pytest.mark.parametrize("safeguard", ["none", "descent", "residual", "loss"])
def test_update(safeguard):
    uphill = Rejection.DESCENT if safeguard == "descent" else None
    assert judge_update(1e-300, safeguard) is None
    assert judge_update(0.0, safeguard) is uphill  # only if it is greater than 0
    assert judge_update(-1.0, safeguard) is uphill
    for bad in BAD:
        assert judge_update(bad, safeguard) is Rejection.NONFINITE


def test_residual_must_fall():
    """Algorithm 1, line 20: ||r^(k+1)|| < ||r^k||."""
    assert judge_residual(1.0, 0.999) is None
    assert judge_residual(1.0, 1.0) is Rejection.RESIDUAL
    for bad in (1.001, math.inf, math.nan):
        assert judge_residual(1.0, bad) is Rejection.RESIDUAL


def test_loss_must_not_rise():
    assert judge_loss(1.0, 0.5) is None
    assert judge_loss(1.0, 1.0) is None  # as good is good enough
    for bad in (1.001, math.inf, math.nan):
        assert judge_loss(1.0, bad) is Rejection.LOSS
    assert judge_loss(math.nan, 1.0) is Rejection.LOSS


def attempts_left_out(backoff):
    count = 0
    while not backoff.ready():
        count += 1
    return count


def test_pauses_double_with_every_rejection_in_a_row_up_to_a_limit():
    backoff = Backoff()
    assert attempts_left_out(backoff) == 0
    for expected in (4, 8, 16, 32, 64, 64):
        backoff.judged_by_loss(True)
        assert attempts_left_out(backoff) == expected
        assert attempts_left_out(backoff) == 0
    backoff.judged_by_loss(False)
    backoff.judged_by_loss(True)
    assert attempts_left_out(backoff) == 4


def test_a_long_pause_where_descent_rejects_most_attempts():
    often = Backoff()
    for _ in range(22):  # 1 - 0.97^22 < 0.5 < 1 - 0.97^23
        often.judged_by_descent(True)
    assert often.ready()
    often.judged_by_descent(True)
    assert attempts_left_out(often) == 64
    seldom = Backoff()
    for k in range(1000):
        seldom.judged_by_descent(k % 5 < 2)
        assert seldom.ready()
    most = Backoff()
    paused = 0
    for k in range(1000):
        most.judged_by_descent(k % 5 < 3)
        paused += attempts_left_out(most) > 0
    assert paused > 3
