"""The benchmark of a step's wall-clock runs on real ranks and leaves its table."""

import json

import pytest

from benchmarks import step_time


@pytest.mark.ranks
def test_a_short_run(tmp_path, capfd):
    out = tmp_path / "found" / "step_time.json"
    words = ["--problem=quadratic", "--blocks=2", "--steps=4", f"--out={out}"]
    assert step_time.main(words) == 0
    printed = capfd.readouterr().out
    found = json.loads(out.read_text())
    assert found["ranks"] == 2
    assert set(found["rows"]) == {"Horovod's own", "p = 5", "p = 2"}
    assert found["rows"]["Horovod's own"]["ratio"] == 1.0
    assert found["rows"]["p = 2"]["steps"] == 12
    assert all(row["ms_per_step"] > 0 for row in found["rows"].values())
    assert "p = 5" in printed and "quartiles" in printed
    assert out.with_suffix(".png").stat().st_size > 0


@pytest.mark.parametrize("words", [["--problem=nothing"], ["--ranks=0"], ["--steps=-1"]])
def test_bad_arguments(words, capsys):
    assert step_time.main(words) == 2
    assert words[0][2:].split("=")[0] in capsys.readouterr().err
