"""Listing and checking image folders: right labels, or an error that names what is wrong."""

import itertools
import os
import shutil
from pathlib import Path

import pytest
from conftest import numbered_images

from models.data import find_corrupt, list_images, write_digits
from models.errors import UserError


def test_labels_are_positions_of_sorted_training_classes(tmp_path):
    images = numbered_images(tmp_path, 7)
    assert images.classes == ("class0", "class1", "class2")
    for file, label in zip(images.files, images.labels, strict=True):
        assert file.startswith(f"class{label}{os.sep}")
    assert len(images) == 7


def test_folders_that_are_no_classes_do_not_shift_labels(tmp_path):
    expected = numbered_images(tmp_path, 7)
    for name in (".thumbnails", "lost+found", ".git"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / expected.files[0], tmp_path / name / "0.jpg")
    (tmp_path / "README.txt").write_text("no image")
    (tmp_path / "class1" / "notes.txt").write_text("no image")
    (tmp_path / "class1" / "._001.jpg").write_text("what macOS leaves")
    assert list_images(tmp_path) == expected


def test_validation_takes_the_training_classes(tmp_path):
    """Labels stay those of training where classes are missing, which is said."""
    train = numbered_images(tmp_path / "train", 6)
    numbered_images(tmp_path / "val", 6)
    shutil.rmtree(tmp_path / "val" / "class1")
    val = list_images(tmp_path / "val", train.classes)
    assert val.classes == train.classes and set(val.labels) == {0, 2}
    (note,) = val.notes
    assert "holds 2 of 3 classes; without images: class1" in note
    (tmp_path / "val" / "dog").mkdir()
    with pytest.raises(UserError, match=r"no training class: dog; missing: class1"):
        list_images(tmp_path / "val", train.classes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "no such data folder"),
        (lambda root: root.mkdir(), "no class folders"),
        (lambda root: (root / ".hidden").mkdir(parents=True), "no class folders"),
        (lambda root: (root / "cat").mkdir(parents=True), "without images .* cat"),
        (
            lambda root: (numbered_images(root, 3), (root / "zebra").mkdir()),
            "without images .* zebra",
        ),
    ],
)
def test_empty_data(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        list_images(tmp_path / "data")


def test_digest_sees_files_labels_and_order_but_not_the_place(tmp_path):
    first = numbered_images(tmp_path / "a", 6)
    assert numbered_images(tmp_path / "b", 6).digest == first.digest
    assert numbered_images(tmp_path / "c", 5).digest != first.digest
    assert numbered_images(tmp_path / "d", 6, classes=2).digest != first.digest
    assert first.shuffled(1).digest != first.digest
    assert sorted(first.shuffled(1).files) == sorted(first.files)


def test_corrupt_images_are_named(tmp_path, kind):
    images = numbered_images(tmp_path, 9)
    paths = images.paths()
    whole = Path(paths[2]).read_bytes()
    Path(paths[2]).write_bytes(whole[: len(whole) // 2])
    Path(paths[5]).write_bytes(os.urandom(500))
    Path(paths[7]).write_bytes(b"")
    found = find_corrupt(images, loader=kind, threads=2)
    assert [text.split(" (")[0] for text in found] == [paths[2], paths[5], paths[7]]
    # The shards of three ranks together find the same, once each.
    shards = [find_corrupt(images, loader=kind, shard=rank, shards=3) for rank in range(3)]
    assert sorted(itertools.chain(*shards)) == sorted(found)


def test_cut_anywhere_in_the_pixels_is_noticed(digits, tmp_path, kind):
    """Truncation by a single block must not pass, as it would not in training."""
    images = list_images(digits / "train")
    whole = Path(images.paths()[0]).read_bytes()
    folder = tmp_path / "0"
    folder.mkdir()
    cuts = range(len(whole) * 3 // 4, len(whole) - 8, 7)
    for cut in cuts:
        (folder / f"{cut}.jpg").write_bytes(whole[:cut])
    assert len(find_corrupt(list_images(tmp_path), loader=kind)) == len(cuts)


def test_digits_are_written_once_and_whole(digits, tmp_path, monkeypatch):
    train = list_images(digits / "train")
    val = list_images(digits / "val", train.classes)
    assert (len(train), len(val), train.classes) == (1500, 297, tuple("0123456789"))
    before = (digits / "train" / train.files[0]).stat().st_mtime_ns
    write_digits(digits, size=16)
    assert (digits / "train" / train.files[0]).stat().st_mtime_ns == before
    with pytest.raises(FileExistsError):
        write_digits(digits, size=32)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path / "digits", size=16)
    assert list(tmp_path.iterdir()) == []
