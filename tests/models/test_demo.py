"""The demo in small: it ends, and its table holds what its runs measured."""

import json

import pytest
from launching import start

from aadl_hvd import AndersonConfig
from models.demo import Run, _table
from models.metrics import read_csv


@pytest.mark.ranks
def test_demo_compares_what_was_measured(tmp_path):
    code, output = start("models.demo", f"--out={tmp_path}", "--steps=7", limit=240)
    assert code == 0, output[-4000:]
    assert "horovodrun on MPI" in output or "horovodrun on GLOO, since" in output
    assert "<stdout>" not in output and "Traceback" not in output
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "comparison.txt").read_text()
    assert table in output
    for run in ("off", "default"):
        summary = json.loads((tmp_path / run / "summary.json").read_text())
        assert summary["ranks"] == 2 and summary["steps"] == 7 and summary["loader"] == "dali"
        assert f"{summary['validation_top1']:.2%}" in table
    # Same weights, same batches: until acceleration first fires the runs are one and the same.
    first = [read_csv(tmp_path / run / "steps.csv")[0]["loss"] for run in ("off", "default")]
    assert first[0] == first[1]
    stats = json.loads((tmp_path / "default" / "summary.json").read_text())["acceleration"]
    # A point rejected by the next loss was accelerated first; that step stores nothing.
    lost = stats["rejected"]["loss"]
    attempts = stats["accelerated"] + sum(stats["rejected"].values()) - lost
    assert stats["stored"] == 7 - lost and attempts == 7 // AndersonConfig().frequency


def run(losses, **summary):
    steps = [{"step": i + 1, "loss": x, "seconds": 0.5} for i, x in enumerate(losses)]
    numbers = {"validation_top1": 0.5, "validation_loss": 1.0, "training_seconds": 2.0}
    numbers |= {"averaged_validation_top1": 0.6, "averaged_validation_loss": 0.9}
    return Run(steps=steps, epochs=[], summary=numbers | {"training_loss": losses[-1]} | summary)


def test_table_says_so_when_acceleration_loses():
    stats = {"percent_of_training_time": 3.0, "accelerated": 1, "rejected": {"descent": 2},
             "averaged": 0, "history_bytes_on_rank_0": 10}  # fmt: skip
    base = run([4.0, 2.0, 1.0])
    lost = _table(base, run([4.0, 3.0, 1.5], acceleration=stats))
    assert "not in 3" in lost
    won = next(
        line
        for line in _table(base, run([4.0, 1.0, 2.0], acceleration=stats)).splitlines()
        if line.startswith("steps to")
    )
    assert won.split()[-2:] == ["3", "2"]
