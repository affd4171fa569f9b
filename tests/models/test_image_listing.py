"""What an image folder may hold besides plain files: nothing is lost or doubled without a word."""

import os
import shutil

import pytest
from conftest import numbered_images
from PIL import Image

from models.data import LoaderOptions, find_corrupt, list_images, open_loader
from models.errors import UserError


@pytest.fixture
def root(tmp_path):
    """Three classes with an image each."""
    numbered_images(tmp_path / "train", 3)
    return tmp_path / "train"


def test_a_class_that_is_a_link_to_nothing_is_an_error(root):
    shutil.rmtree(root / "class1")
    os.symlink("/gone/away", root / "class1")
    with pytest.raises(UserError, match=r"fix or remove them: class1 -> /gone/away \(No such file"):
        list_images(root)


def test_a_class_that_leads_back_is_an_error(root):
    os.symlink("..", root / "class3")
    with pytest.raises(UserError, match=r"class3 -> \.\. \(a folder above it\)"):
        list_images(root)


@pytest.mark.parametrize("target", [".", "..", "../..", "/"])
def test_links_back_do_not_multiply_images(root, target):
    expected = list_images(root)
    os.symlink(target, root / "class0" / "back")
    images = list_images(root)
    assert images == expected
    assert images.notes == (f"left out of {root}: 1 links to folders listed already",)


def test_a_folder_is_listed_once_by_its_own_name(root):
    """Whichever comes first in the alphabet."""
    os.mkdir(root / "class0" / "m")
    os.rename(root / "class0" / "000.jpg", root / "class0" / "m" / "000.jpg")
    os.symlink("m", root / "class0" / "a")
    os.symlink("m", root / "class0" / "z")
    assert list_images(root).files[0] == "class0/m/000.jpg" and len(list_images(root)) == 3


def test_links_to_other_places_are_followed(root, tmp_path):
    numbered_images(tmp_path / "elsewhere", 6)
    os.symlink(tmp_path / "elsewhere" / "class0", root / "class0" / "more")
    os.symlink(tmp_path / "elsewhere" / "class1", root / "class3")
    os.symlink(tmp_path / "elsewhere" / "class2" / "002.jpg", root / "class1" / "one.jpg")
    images = list_images(root)
    assert images.classes == ("class0", "class1", "class2", "class3")
    assert images.labels == (0, 0, 0, 1, 1, 2, 3, 3)
    assert images.notes == ()


def test_all_that_is_left_out_is_counted_by_kind(root):
    for number in range(4):
        (root / "class0" / f"{number}.gif").write_bytes(b"")
    (root / "class1" / "a.GIF").write_bytes(b"")
    (root / "class1" / "notes.txt").write_text("no image")
    (root / "class1" / ".DS_Store").write_text("no image")
    (root / "README").write_text("no image")
    shutil.copy(root / "class0" / "000.jpg", root / "lost.jpg")
    os.mkfifo(root / "class2" / "pipe.jpg")
    os.symlink("nowhere", root / "class2" / "folder")
    for folder in (root, root / "class2"):
        (folder / "__MACOSX").mkdir()
        shutil.copy(root / "class0" / "000.jpg", folder / "__MACOSX" / "0.jpg")
    images = list_images(root)
    assert len(images) == 3
    (note,) = images.notes
    assert note.startswith(f"left out of {root}: 5 .gif, 2 __MACOSX, ")
    for part in ("1 .txt", "1 hidden", "1 without a suffix", "1 .jpg beside the class folders",
                 "1 no regular files", "1 links to nothing"):  # fmt: skip
        assert part in note
    (root / "class3").mkdir()
    (root / "class3" / "0.gif").write_bytes(b"")
    with pytest.raises(UserError, match=r"without images .*: class3; left out of .*6 \.gif"):
        list_images(root)


@pytest.mark.parametrize(
    "suffix", ["jpeg", "PNG", "webp", "BMP", "tif", "tiff", "jp2", "ppm", "JFIF"]
)
def test_what_both_loaders_take_is_listed(root, suffix):
    kind = {"jfif": "JPEG", "tif": "TIFF", "jp2": "JPEG2000", "ppm": "PPM"}
    kind = kind.get(suffix.lower(), suffix.upper())
    Image.new("RGB", (8, 8)).save(root / "class0" / f"x.{suffix}", format=kind)
    assert f"class0/x.{suffix}" in list_images(root).files


def test_a_link_to_no_image_is_an_image_that_cannot_be_read(root, kind):
    os.symlink("gone.jpg", root / "class0" / "link.jpg")
    images = list_images(root)
    assert len(images) == 4
    assert find_corrupt(images, loader=kind) == [
        f"{root}/class0/link.jpg (No such file or directory)"
    ]


def test_a_folder_that_cannot_be_read_is_an_error(root, monkeypatch):
    """For root every folder can be."""
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    (root / "class1" / "sub").mkdir()
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"cannot read .*class1/sub: Permission denied"):
        list_images(root)


def test_names_that_are_too_long_are_one_line(root, monkeypatch, kind):
    with pytest.raises(UserError, match=r"cannot read the data folder .*: File name too long"):
        list_images("x" * 300)
    monkeypatch.chdir(root / "class0")
    while len(os.getcwd()) < 4096 - 250:
        os.mkdir("d" * 240)
        os.chdir("d" * 240)
    Image.new("RGB", (8, 8)).save("i" * 250 + ".jpg")  # over 4,096 with all its folders
    (found,) = find_corrupt(list_images(root), loader=kind)
    assert found.endswith("i.jpg (File name too long)")
    os.mkdir("d" * 250)
    with pytest.raises(UserError, match=r"cannot read .*: File name too long"):
        list_images(root)


def test_odd_classes_are_said(tmp_path, root):
    assert list_images(root).notes == ()
    numbered_images(tmp_path / "one", 2, classes=1)
    (note,) = list_images(tmp_path / "one").notes
    assert "there is one class only, class0" in note
    (note,) = list_images(tmp_path / "one", ("class0", "class1")).notes
    assert "holds 1 of 2 classes; without images: class1" in note
    shutil.copytree(root / "class1", root / "Class1")
    (note,) = list_images(root).notes
    assert "differ in upper and lower case alone: Class1 and class1" in note


def test_a_file_of_two_names_is_said(root):
    os.link(root / "class0" / "000.jpg", root / "class1" / "same.jpg")
    os.symlink("../class0/000.jpg", root / "class2" / "same.jpg")
    (note,) = list_images(root).notes
    assert "2 images are listed twice: class0/000.jpg and class1/same.jpg, class1/same.jpg" in note


def test_names_that_are_not_utf8(root, kind):
    name = os.fsdecode(b"class0/\xff\xfe.jpg")
    shutil.copy(root / "class0" / "000.jpg", root / name)
    images = list_images(root)
    assert name in images.files
    assert len(images.digest) == 64 and images.digest != images.shuffled(1).digest
    found = find_corrupt(images, loader=kind)
    assert [text.split(" (")[1] for text in found] == (
        ["its name is not UTF-8, which DALI cannot open)"] if kind == "dali" else []
    )
    options = LoaderOptions(train=True, batch_size=4, image_size=8, resize=8, workers=1)
    if kind == "dali":
        with pytest.raises(
            UserError, match=r"1 of .* such as .*\\udcff\\udcfe.jpg'.*--loader torch"
        ):
            open_loader(kind, images, options)
