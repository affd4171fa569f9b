"""Checks that the chosen loader can read every image."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from models.data.decode import open_image, show
from models.data.folder import ImageList

GREY_LEVELS_APART = 6.0
"""Largest mean absolute difference between DALI's pixels and torch's loader's, 0 to 255."""


def find_corrupt(
    images: ImageList,
    *,
    loader: str = "dali",
    channels: int = 3,
    shard: int = 0,
    shards: int = 1,
    threads: int = 1,
) -> list[str]:
    """Decodes every `shards`-th image and names those that the loader cannot read.

    One such image ends a DALI pipeline in the middle of an epoch, on one rank, and often without
    its name. So all images are checked before training. A file is named if it is damaged, if the
    loader does not take its kind, or if its pixels have no agreed brightness (floating point).
    For DALI it is also named if the pixels differ from those of torch's loader.

    Args:
        images: Images to check.
        loader: "dali" or "torch".
        channels: 3 for colour, 1 for grey.
        shard: This rank's shard, below `shards`.
        shards: Number of ranks that share the work.
        threads: Files decoded at the same time.

    Returns:
        ``PATH (reason)`` for each such file, in the order of the list.

    Raises:
        UserError: DALI is asked for and not installed.
    """
    paths = images.paths()[shard::shards]
    why = _for_dali(channels) if loader == "dali" else _why_not_torch
    with ThreadPoolExecutor(threads) as pool:
        reasons = pool.map(lambda path: _reason(why, path), paths)
        return [f"{path} ({reason})" for path, reason in zip(paths, reasons, strict=True) if reason]


def _reason(why: Callable[[str], str | None], path: str) -> str | None:
    try:
        return why(path)
    except Exception as error:  # decoders raise many kinds
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        return f"cannot be decoded: {error}"


def _why_not_torch(path: str) -> None:
    """Raises if the file cannot be decoded."""
    with open(path, "rb") as file, open_image(file) as image:
        # Every byte of a JPEG is still entropy-decoded, so a truncated file is found. The scaled
        # inverse transform makes this about three times faster.
        image.draft("L", (1, 1))
        show(image, "L")


def _for_dali(channels: int) -> Callable[[str], str | None]:
    from models.data.dali import Decoder, can_open

    of_thread = threading.local()

    def why(path: str) -> str | None:
        if not can_open(path):
            return "its name is not UTF-8, which DALI cannot open"
        if not hasattr(of_thread, "decoder"):
            of_thread.decoder = Decoder(channels)
        decoder: Decoder = of_thread.decoder
        data = Path(path).read_bytes()
        with open_image(io.BytesIO(data)) as image:
            if _exif_blocks(image) > 1:
                return "it has several EXIF blocks, which DALI crashes on"
            ordinary = image.format == "JPEG" and image.mode in ("L", "RGB")
            expected = None
            if not ordinary or "exif" in image.info:
                expected = np.asarray(show(image, "RGB" if channels == 3 else "L"))
            kind = f"{image.format}, mode {image.mode}"
        try:
            if expected is None:
                decoder.decode_last_pixel(data)
                return None
            pixels = decoder.decode(data)
        except RuntimeError:  # its text names lines of DALI's source
            return f"DALI cannot decode it: {kind}"
        return _difference(pixels, expected, kind)

    return why


def _exif_blocks(image: Image.Image) -> int:
    segments = getattr(image, "applist", [])
    return sum(name == "APP1" and data.startswith(b"Exif\0") for name, data in segments)


def _difference(pixels: np.ndarray, expected: np.ndarray, kind: str) -> str | None:
    expected = expected.reshape(*expected.shape[:2], -1)
    if pixels.shape != expected.shape:
        return f"DALI does not turn it as its EXIF orientation says: {kind}"
    apart = float(np.abs(pixels.astype(np.int16) - expected).mean())
    if apart > GREY_LEVELS_APART:
        return f"DALI shows other pixels than torch's loader, by {apart:.0f} of 255: {kind}"
    return None
