"""Photographs whose metadata is broken, turned photographs among them; photographs of phones and browsers."""

from __future__ import annotations

import importlib.util
import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from classification.data.images import image_size, read_image
from classification.errors import UserError

# Four fields of one colour each, in a photograph that lies on its side.
FIELDS = np.kron(np.array([[10, 200, 90], [250, 30, 140]], dtype=np.uint8), np.ones((16, 16), dtype=np.uint8))
FIELDS = np.stack([FIELDS, 255 - FIELDS, FIELDS // 2], -1)


def encoded(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(FIELDS).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes, sum_: int | None = None) -> bytes:
    """A PNG chunk."""
    crc = zlib.crc32(kind + content) if sum_ is None else sum_
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def segment(kind: int, content: bytes) -> bytes:
    """A JPEG segment."""
    return struct.pack(">BBH", 0xFF, kind, len(content) + 2) + content


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of (tag, type, count, value)."""
    table = b"".join(struct.pack(">HHI4s", *entry) for entry in entries)
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + table + bytes(4)


TURNED_RIGHT = (0x0112, 3, 1, b"\0\6\0\0")
BOMB = zlib.compress(bytes(2 << 20))  # more than Pillow takes for a text
BROKEN_PNG = {
    "raw exif, short": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 20\n4949"),
    "raw exif, no hex": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 20\nzz"),
    "exif, garbage": chunk(b"eXIf", b"garbage"),
    "exif, cut": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\5\1\x12"),
    "exif, wrong sum": chunk(b"eXIf", b"garbage", 7),
    "icc, no zlib": chunk(b"iCCP", b"icc\0\0notzlib"),
    "icc, method": chunk(b"iCCP", b"icc\0\7notzlib"),
    "icc, cut": chunk(b"iCCP", b"icc"),
    "icc, empty": chunk(b"iCCP", b""),
    "icc, endless": chunk(b"iCCP", b"icc\0\0" + BOMB),
    "text, method": chunk(b"zTXt", b"a\0\5nozlib"),
    "text, endless": chunk(b"zTXt", b"a\0\0" + BOMB),
    "text, wrong sum": chunk(b"tEXt", b"a\0b", 7),
    "xmp, endless": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB),
    "xmp, cut": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta><rdf:Desc"),
    "resolution, cut": chunk(b"pHYs", b"a"),
    "gamma, cut": chunk(b"gAMA", b"a"),
    "colours, cut": chunk(b"cHRM", b"a") + chunk(b"sRGB", b""),
    "animation, cut": chunk(b"acTL", b"") + chunk(b"fcTL", b"\0"),
}
BROKEN_JPEG = {
    "exif, garbage": segment(0xE1, b"Exif\0\0garbage garbage"),
    "exif, cut": segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\5\1\x12"),
    "exif, far": segment(0xE1, b"Exif\0\0MM\0*\xff\0\0\x08\0\5\1\x12"),
    "orientation, a text": segment(0xE1, b"Exif\0\0" + exif((0x0112, 2, 2, b"6\0\0\0"))),
    "orientation, unknown": segment(0xE1, b"Exif\0\0" + exif((0x0112, 3, 1, b"\0\x63\0\0"))),
    "orientation, no value": segment(0xE1, b"Exif\0\0" + exif((0x0112, 3, 0, b"\0\6\0\0"))),
    "icc, numbers": segment(0xE2, b"ICC_PROFILE\0\2\1abc") + segment(0xE2, b"ICC_PROFILE\0\5\0abc"),
    "icc, garbage": segment(0xE2, b"ICC_PROFILE\0\1\1abcnotaprofile"),
    "icc, cut": segment(0xE2, b"ICC_PROFILE\0"),
    "several pictures, cut": segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\3"),
    "photoshop, cut": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x10ab"),
    "jfif, cut": segment(0xE0, b"JFIF"),
    "adobe, cut": segment(0xEE, b"Adobe"),
    "xmp, cut": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:D\xff"),
}


def check_fields(path: Path, *, turned: bool = False) -> None:
    """Check the pixels, and that a cache has room for them."""
    expected = FIELDS.astype(int)
    if turned:  # what was left is on top
        expected = np.rot90(expected, -1)
    image = np.asarray(read_image(str(path))).astype(int)
    assert image.shape == expected.shape == (*image_size(str(path)), 3), path
    assert np.abs(image - expected).mean() < 3, path


def test_photographs_whose_metadata_alone_is_broken_are_read(tmp_path: Path) -> None:
    png, jpeg = encoded("PNG"), encoded("JPEG", quality=95, subsampling=0)
    for name, broken in BROKEN_PNG.items():
        for place, at in (("before", 33), ("after", len(png) - 12)):  # the pixels
            path = tmp_path / f"{name} {place}.png"
            path.write_bytes(png[:at] + broken + png[at:])
            check_fields(path)
    for name, broken in BROKEN_JPEG.items():
        path = tmp_path / f"{name}.jpg"
        path.write_bytes(jpeg[:2] + broken + jpeg[2:])
        check_fields(path)
    for name in ("webp", "tiff"):
        options = {"lossless": True} if name == "webp" else {}
        path = tmp_path / f"a.{name}"
        path.write_bytes(
            encoded(name, exif=exif((0x8769, 4, 1, b"\xff\xff\0\0")), icc_profile=b"no profile", **options)
        )
        check_fields(path)
    path.with_suffix(".webp").write_bytes(encoded("WEBP", exif=b"garbage garbage", lossless=True))
    check_fields(path.with_suffix(".webp"))


def test_a_photograph_for_print_is_read_though_its_profile_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "cmyk.jpg"
    Image.new("CMYK", (6, 4), (0, 255, 255, 55)).save(path, quality=100)  # red of 200
    whole = path.read_bytes()
    path.write_bytes(whole[:2] + BROKEN_JPEG["icc, cut"] + whole[2:])
    assert np.allclose(np.asarray(read_image(str(path))).mean((0, 1)), [200, 0, 0], atol=4)
    at = whole.index(b"Adobe") + 11
    coded = whole[:at] + b"\2" + whole[at + 1 :]  # as luma and chroma, which the Adobe segment alone says
    path.write_bytes(coded[:2] + BROKEN_JPEG["icc, cut"] + coded[2:])
    with Image.open(io.BytesIO(coded)) as image:
        assert np.array_equal(np.asarray(read_image(str(path))), np.asarray(image.convert("RGB")))


def test_a_photograph_is_turned_though_other_metadata_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    jpeg = encoded("JPEG", quality=95, subsampling=0)
    beside = (0x0100, 2, 4, b"ab\0\0"), (0x011A, 7, 4, b"\1\2\3\4"), (0x8769, 2, 4, b"abc\0")
    for entry in beside:
        path.write_bytes(jpeg[:2] + segment(0xE1, b"Exif\0\0" + exif(TURNED_RIGHT, entry)) + jpeg[2:])
        check_fields(path, turned=True)
    good = segment(0xE1, b"Exif\0\0" + exif(TURNED_RIGHT))
    path.write_bytes(jpeg[:2] + good + BROKEN_JPEG["icc, cut"] + jpeg[2:])
    check_fields(path, turned=True)
    png = encoded("PNG")
    path = tmp_path / "a.png"
    path.write_bytes(png[:33] + chunk(b"eXIf", exif(TURNED_RIGHT)) + BROKEN_PNG["resolution, cut"] + png[33:])
    check_fields(path, turned=True)


def test_broken_pixels_are_not_taken_for_broken_metadata(tmp_path: Path) -> None:
    png, jpeg = encoded("PNG"), encoded("JPEG")
    damaged = bytearray(png)
    damaged[png.index(b"IDAT") + 8] ^= 255
    for name, content in {
        "pixels.png": bytes(damaged),
        "half.png": png[:33] + BROKEN_PNG["icc, cut"] + png[33:-60],
        "half.jpg": jpeg[:2] + BROKEN_JPEG["icc, cut"] + jpeg[2:-60],
        "clear.png": png[:33] + chunk(b"tRNS", b"\0") + png[33:],
        "head.jpg": jpeg[:20],
        "short.jpg": b"\xff\xd8\xff\xe1\0",
        "head.png": png[:40],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            read_image(str(tmp_path / name))


def test_photographs_of_phones_and_browsers_are_read(tmp_path: Path) -> None:
    for name, kind in (("a.jfif", "JPEG"), ("a.JPE", "JPEG"), ("a.webp", "WEBP"), ("a.avif", "AVIF"), ("a.gif", "GIF")):
        options = {"quality": 95} if kind in ("JPEG", "WEBP", "AVIF") else {}
        (tmp_path / name).write_bytes(encoded(kind, **options))
        image = np.asarray(read_image(str(tmp_path / name))).astype(int)
        assert image.shape == FIELDS.shape and np.abs(image - FIELDS).mean() < 12
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("b.webp", "b.avif", "b.gif", "b.png", "b.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        red, green, blue = np.asarray(read_image(str(tmp_path / name))).reshape(-1, 3).mean(0)
        assert red > 240 and green < 15 and blue < 15


def test_heic_is_read_by_its_content_or_names_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "phone.jpg"  # often renamed
    path.write_bytes(b"\0\0\0\x1cftypheic" + bytes(100))
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
        with pytest.raises(
            UserError, match=r"phone\.jpg cannot be read \(it is HEIC: `pip install pillow-heif` to read"
        ):
            read_image(str(path))
    if importlib.util.find_spec("pillow_heif") is None:
        pytest.skip("pillow-heif is not installed")
    import pillow_heif

    with pytest.raises(UserError, match=r"phone\.jpg cannot be read"):
        read_image(str(path))
    for orientation in (1, 6):
        photograph = pillow_heif.from_pillow(Image.fromarray(FIELDS))
        photograph[0].info["exif"] = exif((0x0112, 3, 1, bytes([0, orientation, 0, 0])))
        photograph.save(tmp_path / "a.heic", quality=90)
        (tmp_path / "a.heic").rename(path)
        check_fields(path, turned=orientation == 6)
