"""Files and parts: whole or absent, damage is noticed, what is missing is named."""

import copy
import math
import re
import warnings

import numpy as np
import pytest
import torch
from checkpointing import Run, assert_same

from aadl_hvd import CheckpointError, checkpoint
from aadl_hvd.comm.simulated import run_ranks


def test_missing_parts_are_named():
    parts = run_ranks(3, lambda comm: Run(comm).train(20).opt.sharded_state_dict())
    with pytest.raises(CheckpointError, match="rows 11 to 21 of 32 are missing"):
        checkpoint.merge_shards([parts[0], parts[2]])
    with pytest.raises(CheckpointError, match=r"shards=\[\]"):
        checkpoint.merge_shards([])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.merge_shards([{"anderson": {"format": 4, "history": {"own": {}, "rows": 3}}}])
    columns = {"layout": "columns", "history_depth": 4}
    parts = run_ranks(2, lambda comm: Run(comm, columns).train(20).opt.sharded_state_dict())
    with pytest.raises(CheckpointError, match=r"of column [01], counted from the oldest"):
        checkpoint.merge_shards(parts[:1])


def test_an_older_format_is_refused_in_one_line(tmp_path):
    """As a file, as a state, and as shards to be merged; nothing is loaded."""
    path = tmp_path / "state.pt"
    torch.save({"aadl_hvd_file": 1, "model": {}}, path)
    run = Run(None).train(20)
    before = copy.deepcopy(run.opt.consolidate_state_dict())
    state = copy.deepcopy(before)
    state["anderson"] |= {"format": 2, "history": {"replicated": {}, "rows": {}, "columns": {}}}
    renamed = copy.deepcopy(before)  # before two entries got other names
    averages = renamed["anderson"]["history"]["averages"]
    averages |= {"kinds": averages.pop("decays"), "sums": averages.pop("means")}
    renamed["anderson"]["format"] = 3
    for load in (
        lambda: checkpoint.load(path),
        *(lambda state=state: run.opt.load_state_dict(state) for state in (state, renamed)),
        *(lambda state=state: checkpoint.merge_shards([state]) for state in (state, renamed)),
    ):
        with pytest.raises(CheckpointError) as error:
            load()
        assert re.fullmatch(
            r"Invalid format of .*: [1-5]\. Must be 6: it was written by an older version of "
            r"aadl_hvd, or is damaged\. Load it with the version that wrote it, or train anew\.",
            str(error.value),
        )
    assert_same(run.opt.consolidate_state_dict(), before)


# Files


def test_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    state = {"x": torch.arange(5), "y": [1, (2.5, None)], "z": {"a": "b"}}
    checkpoint.save(path, state)
    assert_same(checkpoint.load(path), state)
    assert torch.load(path, weights_only=True)["y"] == state["y"], "plain torch reads it, too"

    def full(*arguments):
        arguments[1].write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(path, {"x": 1})
    assert_same(checkpoint.load(path), state)
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_files_that_are_none(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="folder"):
        checkpoint.load(tmp_path)
    run = Run(None).train(20)
    checkpoint.save(path, run.opt.consolidate_state_dict())
    data = path.read_bytes()
    for end in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match="cannot read"):
            checkpoint.load(path)
    path.write_bytes(b"garbage" * 1000)
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.load(path)
    torch.save({"model": 1}, path)
    with pytest.raises(CheckpointError, match="not written by"):
        checkpoint.load(path)
    torch.save({"aadl_hvd_file": 99}, path)
    with pytest.raises(CheckpointError, match=r"format of .*: 99"):
        checkpoint.load(path)
    torch.save(Run, path)  # a class: to load it would run code
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.load(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "state.pt"
    checkpoint.save(path, {"x": torch.arange(1000.0)})
    data = bytearray(path.read_bytes())
    place = data.index(np.arange(1000, dtype=np.float32).tobytes()) + 1234
    data[place] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.load(path)


def test_torchs_distributed_checkpoint_takes_a_part(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    run = Run(None).train(20)
    part = run.opt.sharded_state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(part, checkpoint_id=tmp_path, no_dist=True)
        found = Run(None).train(20).opt.sharded_state_dict()
        for tensor in found["anderson"]["history"]["columns"].values():
            if isinstance(tensor, torch.Tensor):
                tensor.fill_(math.nan)
        dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    assert_same(found, part)
