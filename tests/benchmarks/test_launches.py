"""The count of launches: whole cycles, of points that were accepted, on a pretended GPU."""

import json

import pytest

from benchmarks import launches

WORDS = ["--parameters", "2000", "--ranks", "8", "--warm", "25", "--cycles", "2"]


def test_a_short_run(tmp_path, capsys):
    out, cases = tmp_path / "launches.json", ["subspace", "subspace, overlap=True"]
    assert launches.main([*WORDS, "--cases", *cases, f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert (found["tensors"], found["ranks"], found["device"]) == (161, 8, "pretended")
    assert "launches of a cycle" in capsys.readouterr().out
    at_once, late = found["runs"]
    assert (at_once["steps"], late["steps"]) == (10, 11)
    for run in found["runs"]:
        assert 0 < run["least"] < run["most"] < run["launches"] < 400
    # The jump's memory, its copy, and the addition; one step more reads nothing.
    assert abs(late["launches"] - at_once["launches"]) < 20


def test_a_cycle_without_an_accepted_point_is_none(tmp_path, capsys, monkeypatch):
    steps, _ = launches.CASES["residual-norm"]
    never = launches.Setting({"method": "residual", "warmup_steps": 1000})
    monkeypatch.setitem(launches.CASES, "residual-norm", (steps, never))
    words = [*WORDS, "--cases", "residual-norm", f"--out={tmp_path / 'x.json'}"]
    assert launches.main(words) == 2
    assert "0 accelerated points" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--ranks", "0"], ["--warm", "-1"], ["--parameters", "x"]])
def test_bad_arguments(words, capsys, tmp_path):
    assert launches.main([*words, f"--out={tmp_path / 'x.json'}"]) == 2
    assert words[0] in capsys.readouterr().err
