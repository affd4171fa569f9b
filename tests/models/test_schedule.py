"""The learning rate at the steps where it changes."""

import itertools

import pytest

from models.schedule import Schedule

STEPS = 26  # an epoch of ImageNet on 1,536 ranks of 32 images


def test_the_papers_schedule():
    schedule = Schedule(
        peak=1.96,
        epochs=90,
        steps_per_epoch=STEPS,
        warmup="constant",
        warmup_lr=0.05,
        warmup_epochs=5,
        milestones=(30, 60, 80),
    )
    expected = {0: 0.05, 5: 1.96, 29: 1.96, 30: 0.196, 59: 0.196, 60: 0.0196, 80: 0.00196}
    for epoch, rate in expected.items():
        assert schedule.learning_rate(epoch * STEPS) == pytest.approx(rate)
    for epoch, rate in {5: 0.05, 30: 1.96, 60: 0.196, 80: 0.0196, 90: 0.00196}.items():
        assert schedule.learning_rate(epoch * STEPS - 1) == pytest.approx(rate), "a step early"


def test_linear_warmup_ends_at_the_peak():
    schedule = Schedule(
        peak=1.0, epochs=4, steps_per_epoch=10, warmup="linear", warmup_lr=0.2, warmup_epochs=0.8
    )
    rates = [schedule.learning_rate(step) for step in range(10)]
    assert rates == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])


def test_cosine_falls_from_peak_to_zero():
    schedule = Schedule(
        peak=2.0, epochs=11, steps_per_epoch=10, warmup_epochs=1, warmup_lr=0.1, decay="cosine"
    )
    rates = [schedule.learning_rate(step) for step in range(10, 111)]
    assert rates[0] == 2.0 and rates[50] == pytest.approx(1.0) and abs(rates[100]) < 1e-12
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))


def test_no_warmup_and_no_decay():
    schedule = Schedule(peak=0.3, epochs=2, steps_per_epoch=5, decay="none", milestones=(1,))
    assert {schedule.learning_rate(step) for step in range(10)} == {0.3}
