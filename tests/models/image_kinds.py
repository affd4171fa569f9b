"""Writes one picture as image files of many kinds, and says how it looks upright."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms, ImageOps

WIDTH, HEIGHT = 40, 32
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""By EXIF orientation, what makes a stored image upright: values of PIL's Transpose."""

_x, _y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
_colours = [_x * 255 // (WIDTH - 1), _y * 255 // (HEIGHT - 1), 255 - _x * 3 - _y * 2]
RGB = Image.fromarray(np.stack(_colours, -1).astype(np.uint8))
GREY = RGB.convert("L")
ALPHA = Image.fromarray(np.where(_x < 20, 255, _y * 8).astype(np.uint8))
GREY_16 = np.asarray(GREY).astype(np.uint16) * 257


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def upright(image, orientation):
    return image.transpose(Image.Transpose(TURNS[orientation])) if orientation > 1 else image


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(colour, depth, rows, *chunks):
    """A PNG that PIL does not write; chunks of (kind, data) come before the pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(pixels, *, orientation=1, photometric=1, sample_format=1, planar=1):
    """A plain TIFF of an array [H, W] or [H, W, C], as PIL does not write it."""
    samples, bits = (1 if pixels.ndim == 2 else pixels.shape[2]), pixels.itemsize * 8
    data = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    values = {256: WIDTH, 257: HEIGHT, 258: bits, 259: 1, 262: photometric, 273: 0}
    values |= {274: orientation, 277: samples, 278: HEIGHT, 279: len(data), 284: planar}
    values |= {339: sample_format}
    begin = 8 + 2 + 12 * len(values) + 4
    extra = struct.pack("<3H", bits, bits, bits) + struct.pack("<3H", *[sample_format] * 3)
    values[273] = begin + len(extra)
    entries = b""
    for tag, value in sorted(values.items()):
        if samples == 3 and tag in (258, 339):
            entries += struct.pack("<HHII", tag, 3, 3, begin if tag == 258 else begin + 6)
        else:
            entries += struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
    directory = struct.pack("<H", len(values)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8) + directory + extra + data


def jpeg_with(*segments):
    """A JPEG with application segments 1 before all else."""
    whole = encoded(RGB, "JPEG", quality=95, subsampling=0)
    inserted = b"".join(b"\xff\xe1" + struct.pack(">H", len(s) + 2) + s for s in segments)
    return whole[:2] + inserted + whole[2:]


def exif_segment(orientation):
    return b"Exif\0\0" + exif(orientation).tobytes().removeprefix(b"Exif\0\0")


XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'>"
XMP += b"<rdf:Description xmlns:tiff='t' tiff:Orientation=\"6\"/></x:xmpmeta>"


def same_for_both():
    """Yields (name, content, upright image or None): kinds that both loaders show alike."""
    for orientation in range(1, 9):
        want = upright(RGB, orientation)
        options = {"exif": exif(orientation)}
        yield f"o{orientation}.jpg", encoded(RGB, "JPEG", quality=95, **options), want
        yield f"o{orientation}.png", encoded(RGB, "PNG", **options), want
        yield f"o{orientation}.webp", encoded(RGB, "WEBP", quality=95, **options), want
        yield (
            f"o{orientation}.tif",
            tiff(np.asarray(RGB), orientation=orientation, photometric=2),
            want,
        )
    grey_6 = upright(GREY, 6)
    yield "o6-grey.jpg", encoded(GREY, "JPEG", quality=95, exif=exif(6)), grey_6
    yield "o6-grey.tif", tiff(np.asarray(GREY), orientation=6), grey_6
    yield "o6-grey16.tif", tiff(GREY_16, orientation=6), grey_6
    yield (
        "o6-progressive.jpg",
        encoded(RGB, "JPEG", progressive=True, quality=95, exif=exif(6)),
        upright(RGB, 6),
    )
    eXIf = (b"eXIf", exif(6).tobytes().removeprefix(b"Exif\0\0"))
    yield "o6-grey16.png", png(0, 16, GREY_16.astype(">u2"), eXIf), grey_6
    yield "xmp6.jpg", jpeg_with(XMP), RGB  # no EXIF: as it is stored
    yield "exif3-xmp6.jpg", jpeg_with(exif_segment(3), XMP), upright(RGB, 3)
    yield "exif-damaged.jpg", jpeg_with(b"Exif\0\0MM\0*\0\0\0\xffgarbage"), RGB
    yield "exif9.jpg", jpeg_with(exif_segment(9)), RGB

    rgb_16 = np.asarray(RGB).astype(">u2") * 257
    rgba = Image.merge("RGBA", [*RGB.split(), ALPHA])
    palette = RGB.quantize(200)
    yield "grey16.png", encoded(Image.fromarray(GREY_16), "PNG"), GREY
    yield "grey16-transparent.png", png(0, 16, GREY_16.astype(">u2"), (b"tRNS", b"\0\0")), GREY
    yield "grey16.tif", encoded(Image.fromarray(GREY_16), "TIFF"), GREY
    yield "grey16.jp2", encoded(Image.fromarray(GREY_16), "JPEG2000"), GREY
    yield "grey16.pgm", encoded(Image.fromarray(GREY_16), "PPM"), GREY
    yield "rgb16.png", png(2, 16, rgb_16.astype(">u2")), RGB
    yield "rgb16.tif", tiff(rgb_16.astype(np.uint16), photometric=2), RGB
    yield "palette.png", encoded(palette, "PNG"), palette.convert("RGB")
    yield (
        "palette-transparent.png",
        encoded(palette, "PNG", transparency=bytes(range(200))),
        palette.convert("RGB"),
    )
    yield "rgba.png", encoded(rgba, "PNG"), RGB
    yield "la.png", encoded(Image.merge("LA", [GREY, ALPHA]), "PNG"), GREY
    yield "rgb-transparent.png", encoded(RGB, "PNG", transparency=(0, 0, 255)), RGB
    yield "1.png", encoded(RGB.convert("1"), "PNG"), RGB.convert("1")
    yield (
        "animated.png",
        encoded(RGB, "PNG", save_all=True, append_images=[ImageOps.invert(RGB)]),
        RGB,
    )

    cmyk = encoded(RGB.convert("CMYK"), "JPEG", quality=95)
    yield "cmyk.jpg", cmyk, RGB
    ycck = bytearray(cmyk)
    ycck[ycck.find(b"Adobe") + 11] = 2  # what is stored is other colours by that, but the same ones
    yield "ycck.jpg", bytes(ycck), None
    yield "grey.jpg", encoded(GREY, "JPEG", quality=95), GREY
    yield "progressive.jpg", encoded(RGB, "JPEG", quality=95, progressive=True), RGB
    yield "420.jpg", encoded(RGB, "JPEG", quality=90), None
    yield (
        "mpo.jpg",
        encoded(RGB, "MPO", quality=95, save_all=True, append_images=[ImageOps.invert(RGB)]),
        RGB,
    )
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"tmpX").replace(b"gXYZ", b"rXYZ").replace(b"tmpX", b"gXYZ")
    yield "icc.jpg", encoded(RGB, "JPEG", quality=95, icc_profile=swapped), RGB
    yield "icc.png", encoded(RGB, "PNG", icc_profile=swapped), RGB

    yield "rgb.jp2", encoded(RGB, "JPEG2000"), RGB
    yield "alpha.webp", encoded(rgba, "WEBP", lossless=True, exact=True), RGB
    yield (
        "animated.webp",
        encoded(RGB, "WEBP", lossless=True, save_all=True, append_images=[ImageOps.invert(RGB)]),
        RGB,
    )
    for kind, suffix in (("BMP", "bmp"), ("PPM", "pnm"), ("TIFF", "tiff")):
        yield f"rgb.{suffix}", encoded(RGB, kind), RGB
        yield f"grey.{suffix}", encoded(GREY, kind), GREY
    yield "1.bmp", encoded(RGB.convert("1"), "BMP"), RGB.convert("1")
    yield "palette.bmp", encoded(palette, "BMP"), palette.convert("RGB")
    yield "rgba.bmp", encoded(rgba, "BMP"), RGB
    yield "1.pbm", encoded(RGB.convert("1"), "PPM"), RGB.convert("1")
    yield "cmyk.tif", encoded(RGB.convert("CMYK"), "TIFF"), RGB
    yield "png-named.jpg", encoded(RGB, "PNG"), RGB
    yield "bmp-named.JPEG", encoded(RGB, "BMP"), RGB


def refused_by_both():
    """Yields (name, content, part of the reason)."""
    floats = np.asarray(GREY).astype(np.float32) / 255
    yield "float.tif", tiff(floats, sample_format=3), "floating-point"
    yield "signed.tif", tiff((np.asarray(GREY) // 2).astype(np.int8), sample_format=2), "signed"
    yield "lab.tif", encoded(RGB.convert("LAB"), "TIFF"), "mode LAB"
    yield "int32.tif", tiff(GREY_16.astype(np.uint32)), "mode I"
    yield "white0.tif", tiff(65535 - GREY_16, photometric=0), "white is 0"
    yield "text.jpg", b"<html>not found</html>", "no image"
    yield "empty.png", b"", "empty"
    for name, kind in (
        ("cut.jpg", "JPEG"),
        ("cut.png", "PNG"),
        ("cut.webp", "WEBP"),
        ("cut.bmp", "BMP"),
    ):
        whole = encoded(RGB, kind)
        yield name, whole[: len(whole) * 3 // 4], "decode"


def refused_for_dali():
    """Yields (name, content, part of the reason): what torch's loader shows rightly."""
    yield "gif.jpg", encoded(RGB, "GIF"), "DALI cannot decode it: GIF"
    cmyk = encoded(RGB.convert("CMYK"), "JPEG", quality=95)
    adobe = cmyk.find(b"Adobe") - 4
    yield "cmyk-not-adobe.jpg", cmyk[:adobe] + cmyk[adobe + 16 :], "other pixels"
    dark = (np.asarray(GREY) * (100 / 255)).round().astype(np.uint8).tobytes()
    yield "maxval.pgm", f"P5 {WIDTH} {HEIGHT} 100\n".encode() + dark, "other pixels"
    yield "la.tif", encoded(Image.merge("LA", [GREY, ALPHA]), "TIFF"), "other pixels"
    yield "two-exif.jpg", jpeg_with(exif_segment(6), exif_segment(3)), "several EXIF blocks"
    text = f"P2 {WIDTH} {HEIGHT} 255\n" + " ".join(map(str, np.asarray(GREY).ravel()))
    yield "ascii.pgm", text.encode(), "DALI cannot decode it"
    frames = [ImageOps.invert(RGB), RGB]
    apng = encoded(RGB, "PNG", save_all=True, default_image=True, append_images=frames)
    yield "animated.png", apng, "other pixels"
