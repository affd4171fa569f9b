"""python -m models.train on image folders that hold odd things."""

import os
from pathlib import Path

import pytest
from conftest import numbered_images
from launching import start

pytestmark = pytest.mark.ranks

SMALL = [
    "--model=resnet8", "--width=4", "--channels=1", "--image-size=8", "--resize=8", "--epochs=1",
    "--batch-size=8", "--loader=torch", "--workers=0", "--anderson=off", "--device=cpu",
    "--no-tensorboard",
]  # fmt: skip


def test_what_is_left_out_is_said_once_and_names_need_be_no_text(tmp_path):
    data, out = tmp_path / "data", tmp_path / os.fsdecode(b"out-\xff")
    numbered_images(data / "train", 24, classes=2)
    numbered_images(data / "val", 3, classes=1)
    (data / "train" / "class0" / "x.gif").write_bytes(b"")
    first = data / "train" / "class0" / "000.jpg"
    first.rename(first.with_name(os.fsdecode(b"\xe9\xff.jpg")))
    code, output = start(
        "models.train", *SMALL, f"--data={data}", f"--out={out}", PYTHONIOENCODING="utf-8:strict"
    )
    assert code == 0, output[-4000:]
    assert "24 training and 3 validation images of 2 classes" in output
    assert output.count(f"left out of {data}/train: 1 .gif") == 1
    assert output.count(f"warning: {data}/val: holds 1 of 2 classes; without images: class1") == 1
    assert "plot  " in output and r"out-\udcff" in output
    assert Path(out, "last.pt").exists() and Path(out, "training.png").exists()


def test_a_name_that_dali_cannot_open_is_one_line(tmp_path):
    for part in ("train", "val"):
        numbered_images(tmp_path / part, 24, classes=2)
    first = tmp_path / "train" / "class0" / "000.jpg"
    first.rename(first.with_name(os.fsdecode(b"\xff.jpg")))
    code, output = start(
        "models.train", *SMALL, "--loader=dali", "--workers=1", f"--data={tmp_path}",
        f"--out={tmp_path / 'out'}", limit=60,
    )  # fmt: skip
    assert code == 2 and "Traceback" not in output, output[-4000:]
    assert output.count("error: ") == 1 and r"\udcff.jpg (its name is not UTF-8" in output
