"""The benchmark of the tiny reduction runs on real ranks and leaves its table."""

import json

import pytest

from benchmarks import latency


@pytest.mark.ranks
def test_a_short_run(tmp_path, capfd):
    out = tmp_path / "found" / "latency.json"
    words = ["--ranks", "2", "--sizes", "1", "30", "--repeats=5", f"--out={out}"]
    assert latency.main(words) == 0
    printed = capfd.readouterr().out
    found = json.loads(out.read_text())
    assert found["repeats"] == 5 and found["machine"]["cores"] > 0
    assert {(run["ranks"], run["numbers"]) for run in found["runs"]} == {(2, 1), (2, 30)}
    assert "Horovod" in {run["through"] for run in found["runs"]}
    for run in found["runs"]:
        times = run["microseconds"]
        assert 0 < times["first_quartile"] <= times["median"] <= times["third_quartile"]
    assert "median / us" in printed
    assert out.with_suffix(".png").stat().st_size > 0


def test_all_calls_but_the_first_are_timed():
    calls = []
    found = latency.times(lambda: calls.append("x"), 3, lambda: calls.append("barrier"))
    assert len(found) == 3 and all(seconds >= 0 for seconds in found)
    assert calls == ["barrier", "x"] * (3 + latency.WARM_UP)


@pytest.mark.parametrize(
    "words", [["--ranks", "2", "1"], ["--sizes", "0"], ["--repeats", "0"], ["--repeats", "-3"]]
)
def test_bad_arguments(words, capsys):
    assert latency.main(words) == 2
    assert words[0] in capsys.readouterr().err
