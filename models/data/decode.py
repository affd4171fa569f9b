"""Decodes image files for torch's loader. The check of DALI compares with the same pixels.

Images are turned upright by their EXIF orientation. 16 bits per channel become 8 by division.
Transparency is ignored: the colours beneath it are shown. Colour profiles are ignored, too.
"""

from __future__ import annotations

import warnings
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

# Modes of the first frame that are read. Others have no agreed brightness (F) or need a colour
# profile (LAB).
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_MODES_16 = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# In TIFF files: photometric interpretation, planar configuration, bits, sample format.
_PHOTOMETRIC, _PLANAR, _BITS, _FORMAT = 262, 284, 258, 339

# Damaged EXIF data gives no orientation. The warning would come again in every epoch.
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)


def open_image(file: BinaryIO) -> Image.Image:
    """Opens an image and reads its header only.

    Args:
        file: Binary file. A path would let PIL map the file, and it then misreads turned TIFFs.

    Returns:
        PIL's image, to be closed by the caller.

    Raises:
        ValueError: It is no image, or its pixels have no agreed meaning; the message says which.
        OSError: The file's header is damaged.
    """
    try:
        image = Image.open(file)
    except UnidentifiedImageError:  # its text has the address of an object
        raise ValueError("it is empty, or no image that PIL knows") from None
    reason = _without_meaning(image)
    if reason is not None:
        image.close()
        raise ValueError(reason)
    return image


def show(image: Image.Image, mode: str) -> Image.Image:
    """Decodes an open image.

    Args:
        image: From `open_image`.
        mode: "RGB", or "L" for grey.

    Returns:
        The upright image in that mode, 8 bits a channel.

    Raises:
        OSError: The file is damaged.
    """
    image.load()  # some EXIF data comes after the pixels
    turn = _TURNS.get(_orientation(image))
    shown = image
    if _is_16_bit(image):
        # PIL's own conversion cuts off at 255.
        pixels = np.asarray(image).astype(np.uint32)
        shown = Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))
    shown.info.pop("transparency", None)  # else PIL warns that it is left out
    shown = shown.convert(mode)
    return shown if turn is None else shown.transpose(turn)


def _is_16_bit(image: Image.Image) -> bool:
    # PIL reads 16 bits into 32 for these formats only.
    return image.mode in _MODES_16 or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _without_meaning(image: Image.Image) -> str | None:
    tags: Any = getattr(image, "tag_v2", {})
    if any(value != 1 for value in tags.get(_FORMAT, (1,))):
        return "its pixels are signed or floating-point numbers, which have no agreed brightness"
    if image.mode not in _MODES and not _is_16_bit(image):
        return f"its pixels have PIL's mode {image.mode}, without an agreed brightness or colour"
    if max(tags.get(_BITS, (8,))) > 8 and (tags.get(_PHOTOMETRIC) == 0 or tags.get(_PLANAR) == 2):
        return "it is a 16-bit TIFF in which white is 0 or planes are separate, which PIL misreads"
    return None


def _orientation(image: Image.Image) -> int:
    """Returns the orientation, 1 to 8, from the image's EXIF data alone.

    `ImageOps.exif_transpose` also reads XMP, which DALI does not. TIFF files are upright already.
    """
    if image.format == "TIFF" or "exif" not in image.info:
        return 1
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
        return int(exif.get(_ORIENTATION, 1))
    except Exception:  # the parser raises many kinds
        return 1
