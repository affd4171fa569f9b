"""Every kind of image file: both loaders show the network the same, or the check names it."""

import numpy as np
import pytest
import torch
from image_kinds import GREY, HEIGHT, RGB, refused_by_both, refused_for_dali, same_for_both
from PIL import Image

from models.data import LOADERS, LoaderOptions, find_corrupt, list_images, open_loader

GREY_LEVELS = 6.0


def write(root, kinds):
    """Writes them as one class; what is expected, by file name."""
    (root / "a").mkdir()
    expected = {}
    for name, content, expectation in kinds:
        (root / "a" / name).write_bytes(content)
        expected[name] = expectation
    return expected


def shown(images, kind, channels):
    """What a loader shows of each file, in grey levels: float32 [C, H, H] by file name."""
    options = LoaderOptions(
        train=False,
        batch_size=len(images),
        image_size=HEIGHT,
        resize=HEIGHT,
        channels=channels,
        workers=int(kind == "dali"),
    )
    loader = open_loader(kind, images, options)
    batch, _ = next(iter(loader))
    loader.close()
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (options.mean, options.std))
    names = [file.split("/")[1] for file in images.files]
    return dict(zip(names, (batch * std + mean) * 255, strict=True))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("channels", [3, 1])
def test_both_loaders_show_what_the_file_is(tmp_path, channels):
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")
    expected = write(tmp_path, same_for_both())
    images = list_images(tmp_path)
    assert len(images) == len(expected), "each kind is listed"
    for kind in LOADERS:
        assert find_corrupt(images, loader=kind, channels=channels) == []
    by_torch, by_dali = (shown(images, kind, channels) for kind in ("torch", "dali"))
    wrong = []
    for name, image in expected.items():
        apart = (by_torch[name] - by_dali[name]).abs().mean().item()
        off = 0.0
        if image is not None:
            side = image.convert("RGB" if channels == 3 else "L")
            # The longer side is cut, and the shorter is what both are resized to.
            left, top = (side.width - HEIGHT) // 2, (side.height - HEIGHT) // 2
            side = side.crop((left, top, left + HEIGHT, top + HEIGHT))
            pixels = torch.from_numpy(np.array(side)).float().reshape(HEIGHT, HEIGHT, -1)
            off = (by_torch[name] - pixels.permute(2, 0, 1)).abs().mean().item()
        if apart > GREY_LEVELS or off > GREY_LEVELS:
            wrong.append(f"{name}: apart {apart:.0f}, off {off:.0f}")
    assert not wrong


def test_augmented_images_are_upright_and_scaled_too(tmp_path, kind):
    """Random crops come from the decoder in one go with DALI: means of many tell."""
    half = Image.fromarray(np.repeat([[0, 0, 0, 0xFFFF]], 32, 0).repeat(8, 1).astype(np.uint16))
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(64):
        half.save(tmp_path / "a" / f"{number}.png", exif=exif)
    options = LoaderOptions(
        train=True, batch_size=64, image_size=8, resize=8, channels=1, augment="crop",
        workers=int(kind == "dali"),
    )  # fmt: skip
    loader = open_loader(kind, list_images(tmp_path), options)
    batch, _ = next(iter(loader))
    loader.close()
    levels = (batch * options.std[0] + options.mean[0]) * 255
    rows, columns = levels.mean((0, 1, 3)), levels.mean((0, 1, 2))
    assert rows[-1] - rows[0] > 30, "the bright part is below, as the EXIF data says"
    assert columns.max() - columns.min() < 10


@pytest.mark.parametrize("channels", [3, 1])
def test_the_check_names_what_neither_loader_shows(tmp_path, kind, channels):
    expected = write(tmp_path, refused_by_both())
    found = find_corrupt(list_images(tmp_path), loader=kind, channels=channels)
    reasons = {text.split(" (", 1)[0].rsplit("/", 1)[1]: text for text in found}
    assert reasons.keys() == expected.keys()
    for name, part in expected.items():
        assert part in reasons[name], reasons[name]


def test_the_check_asks_the_loader_that_will_be_used(tmp_path):
    """Torch's loader shows these as they are; DALI does not, or ends without the file's name."""
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")
    expected = write(tmp_path, refused_for_dali())
    images = list_images(tmp_path)
    assert find_corrupt(images, loader="torch") == []
    found = find_corrupt(images, threads=2)  # DALI is what --loader is by default
    reasons = {text.split(" (", 1)[0].rsplit("/", 1)[1]: text for text in found}
    assert reasons.keys() == expected.keys()
    for name, part in expected.items():
        assert part in reasons[name], reasons[name]
    for name, levels in shown(images, "torch", 3).items():
        want = RGB if name in ("gif.jpg", "cmyk-not-adobe.jpg", "animated.png") else GREY
        if name == "two-exif.jpg":
            continue
        side = np.asarray(want.convert("RGB").crop((4, 0, 36, 32))).astype(np.float32)
        off = np.abs(levels.permute(1, 2, 0).numpy() - side).mean()
        assert off < GREY_LEVELS + 4 * (name == "gif.jpg"), (name, off)


def test_a_file_that_the_check_did_not_see_is_said(tmp_path, kind):
    """Torch's loader names it; DALI often cannot, and says what would."""
    write(tmp_path, [("0.jpg", b"<html>not found</html>", None)])
    with pytest.raises(RuntimeError, match=r"--check-images names .* before training") as caught:
        shown(list_images(tmp_path), kind, 3)
    assert str(tmp_path) in str(caught.value)
    assert kind == "dali" or "0.jpg" in str(caught.value)
