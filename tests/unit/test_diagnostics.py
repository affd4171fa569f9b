"""What is counted and timed."""

import time

import pytest

from aadl_hvd.stats import Stats


def test_time_of_a_part_within_another_is_counted_once(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0])  # outer begins, inner begins and ends, outer ends
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    stats = Stats()
    with stats.timed("safeguard"), stats.timed("gather"):
        pass
    assert stats.seconds["gather"] == 2.0
    assert stats.seconds["safeguard"] == 5.0


def test_what_failed_took_its_time_too():
    stats = Stats()
    with pytest.raises(KeyError), stats.timed("write"):
        raise KeyError
    assert stats.seconds["write"] > 0.0
