"""Image folders whose pictures tell which file they came from."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from models.data import LOADERS, list_images, write_digits  # noqa: E402

GREY_STEP = 4
"""Image number i is evenly 4 i bright: JPEG keeps that to less than 1."""


def numbered_images(root, count, classes=3):
    """Writes images 0..count-1, i in class i mod classes, and lists them."""
    assert count * GREY_STEP <= 256
    for number in range(count):
        folder = root / f"class{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.full((16, 16), number * GREY_STEP, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.jpg", quality=95)
    return list_images(root)


def numbers(images, options):
    """Reads the numbers back from a batch."""
    grey = images.mean(dim=(1, 2, 3)) * options.std[0] * 255 + options.mean[0] * 255
    return (grey / GREY_STEP).round().int().tolist()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "digits", size=16)


@pytest.fixture(params=LOADERS)
def kind(request):
    """Each loader there is."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")
    return request.param
