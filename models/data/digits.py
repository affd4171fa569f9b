"""Real images without a download: scikit-learn's 1,797 handwritten digits as a JPEG folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN_IMAGES, VAL_IMAGES = 1500, 297


def write_digits(root: str | Path, *, size: int = 32) -> Path:
    """Writes the digits as ``root/train/0..9/*.jpg`` and ``root/val/0..9/*.jpg``.

    The scans are 8 x 8 pixels with 17 grey levels. They are enlarged, since JPEG's 8 x 8 blocks
    would blur the strokes. The split is stratified and always the same. The folder is created
    atomically: an interrupted call leaves no `root`. A second call returns at once.

    Args:
        root: Folder to write.
        size: Side of the images in pixels.

    Returns:
        `root`.

    Raises:
        FileExistsError: `root` exists and was not written by this function with this `size`.
    """
    root = Path(root)
    stamp = f"scikit-learn digits, {size} x {size}, {TRAIN_IMAGES} for training\n"
    if root.exists():
        mark = root / ".complete"
        if not mark.is_file() or mark.read_text() != stamp:
            raise FileExistsError(f"{root} exists and holds something else: move it away")
        return root
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, val = train_test_split(
        np.arange(len(digits.target)),
        train_size=TRAIN_IMAGES,
        stratify=digits.target,
        random_state=0,
    )
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        for part, indices in (("train", train), ("val", val)):
            for index in indices:
                folder = partial / part / str(digits.target[index])
                folder.mkdir(parents=True, exist_ok=True)
                grey = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
                image = Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC)
                image.save(folder / f"{index:04d}.jpg", quality=95)
        (partial / ".complete").write_text(stamp)
        partial.chmod(0o755)  # mkdtemp makes private folders
        try:
            os.rename(partial, root)
        except OSError:
            # Another process was faster; its folder is as good, if it is complete.
            if not (root / ".complete").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root
