"""Checkpoints and metrics survive a crash; wrong checkpoints are refused with the reason."""

import itertools
import math
import os

import pytest
import torch

from aadl_hvd import checkpoint as library_checkpoint
from models import checkpoint
from models.errors import UserError
from models.metrics import MetricsLog, read_csv

IDENTITY = {"model": "resnet8", "classes": ["a", "b"]}


def state(value):
    whole = {"identity": IDENTITY, "model": {"weight": torch.full((1000,), float(value))}}
    whole |= {"epoch": 1, "step": 7, "best": 0.5, "optimizer": {}, "scaler": {}}
    own = {"data": {}, "torch": torch.get_rng_state(), "cuda": None, "python": (3, (), None)}
    return whole | {"ranks": [own]}


def load(path, **changes):
    return checkpoint.load(path, expected=IDENTITY | changes)


@pytest.mark.parametrize("crash_in", ["save", "fsync", "replace"])
def test_a_crash_leaves_the_old_checkpoint(tmp_path, monkeypatch, crash_in):
    path = tmp_path / "last.pt"
    checkpoint.save(path, state(1))

    def half(_, file):
        file.write(b"half a checkpoint")
        raise OSError("disk full")

    def fail(*_):
        raise OSError("disk full")

    where, what = {"save": (torch, half), "fsync": (os, fail), "replace": (os, fail)}[crash_in]
    monkeypatch.setattr(where, crash_in, what)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, state(2))
    monkeypatch.undo()
    assert load(path)["model"]["weight"][0] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    checkpoint.save(tmp_path / "last.pt", state(1))
    assert calls == ["fsync", "replace", "fsync"]


def test_wrong_checkpoints(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(UserError, match="no such checkpoint"):
        load(path)
    with pytest.raises(UserError, match="is a folder"):
        load(tmp_path)
    checkpoint.save(path, state(1))
    with pytest.raises(UserError, match="model was 'resnet8', is 'resnet50'"):
        load(path, model="resnet50")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot read checkpoint"):
            load(path)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not written by"):
        load(path)
    library_checkpoint.save(path, {"weight": torch.zeros(1)})
    with pytest.raises(UserError, match="no checkpoint of this program"):
        load(path)


REMOVED = object()


@pytest.mark.parametrize(
    ("where", "values", "message"),
    [
        ("format", [REMOVED], "is no checkpoint of this program"),
        ("format", [99, "1", True, torch.zeros(9, 9)], "has format .*; this program reads 1"),
        ("identity", [REMOVED], "is no checkpoint of this program"),
        ("identity", [5, None], "'identity' is .* and must be a dict"),
        ("identity", [{"classes": torch.zeros(2)}], "model was None, is 'resnet8'"),
        ("step", ["three", math.nan, -5, True, 7.0, torch.tensor(7)], "'step' is"),
        ("epoch", ["x", math.nan, -1], "'epoch' is"),
        ("epoch best model optimizer scaler ranks", [REMOVED], "lacks"),
        ("best", ["x", math.nan, 2.0, None], "'best' is .* and must be a number from 0 to 1"),
        ("model optimizer", [None, []], "and must be a dict"),
        ("scaler", [None, {"scale": "x"}], "'scaler' is .* and must be a dict of numbers"),
        ("ranks", [None, 5, ["x"]], "'ranks' is .* and must be a list of dicts"),
        ("ranks", [[{}]], "lacks 'data' of rank 0"),
        ("data torch python cuda", [REMOVED, "x"], "(lacks .*|and must be .*)"),
    ],
)
def test_damaged_entries_are_named(tmp_path, where, values, message):
    path = tmp_path / "last.pt"
    for name, value in itertools.product(where.split(), values):
        damaged = {"format": 1, **state(1)}
        within = damaged if name in damaged else damaged["ranks"][0]
        within[name] = value
        if value is REMOVED:
            del within[name]
        library_checkpoint.save(path, damaged)
        with pytest.raises(UserError, match=f"last.pt.*{message}") as caught:
            load(path)
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"identity": Evil()}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="cannot read checkpoint"):
        load(tmp_path / "last.pt")
    assert not (tmp_path / "ran").exists()


def test_resumed_metrics_replace_the_rows_after_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False, say=print)
    for step in range(1, 6):
        log.write("steps", {"step": step, "loss": 1.0 / step, "gap": None})
    log.close()
    log = MetricsLog(tmp_path, tensorboard=False, say=print, resume_step=3)
    log.write("steps", {"step": 4, "loss": 9.0, "gap": 2.0})
    log.close()
    rows = read_csv(tmp_path / "steps.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0] == {"step": 1, "loss": 1.0} and rows[3]["gap"] == 2.0
    log = MetricsLog(tmp_path, tensorboard=False, say=print)
    log.write("steps", {"step": 1, "loss": 5.0, "gap": None})
    log.close()
    assert len(read_csv(tmp_path / "steps.csv")) == 1
