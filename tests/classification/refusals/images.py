"""Image files that are none, or none that one can train on."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from classification import main_mgd
from tests.classification.conftest import TEACHER
from tests.classification.refusals import Case, Place


def encoded(kind: str, image: Image.Image | None = None) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    (image or Image.fromarray(noise)).save(buffer, kind)
    return buffer.getvalue()


def with_image(place: Place, name: str, content: bytes, split: str = "train") -> Path:
    data = place.copy()
    (data / split / "dot" / name).write_bytes(content)
    return data


def halves(place: Place) -> list[str]:
    whole = encoded("PNG")
    return place.base(data=with_image(place, "half.png", whole[: len(whole) // 2]))


def strip(place: Place) -> list[str]:
    return place.base(data=with_image(place, "strip.jpg", encoded("JPEG", Image.new("RGB", (1, 60_000)))))


def not_a_number(place: Place) -> list[str]:
    image = Image.fromarray(np.full((16, 16), np.nan, dtype=np.float32))
    return place.base(data=with_image(place, "nan.tif", encoded("TIFF", image)))


def deep(place: Place) -> list[str]:
    image = Image.fromarray(np.full((16, 16), 70_000, dtype=np.int32))
    return place.base(data=with_image(place, "deep.tif", encoded("TIFF", image)))


def link(place: Place) -> list[str]:
    data = place.copy()
    (data / "train" / "dot" / "link.png").symlink_to("nowhere.png")
    return place.base(data=data)


def pipe(place: Place) -> list[str]:
    data = place.copy()
    os.mkfifo(data / "train" / "dot" / "pipe.png")
    return place.base(data=data)


def emptied(place: Place, *parts: str) -> Path:
    """A copy of the photographs whose files below `parts` are empty."""
    data = place.copy()
    for path in data.joinpath(*parts).rglob("*.png"):
        path.write_bytes(b"")
    return data


def loop(place: Place) -> list[str]:
    data = place.copy()
    (data / "train" / "loop").symlink_to(data / "train")
    return place.distil("--labels", "0", "--distiller", "kd", data=data)


def evaluated(place: Place) -> list[str]:
    data = with_image(place, "deep.ppm", b"P6 2 2 99999999\n" + bytes(12), "valid")
    return place.base("-a", TEACHER, "--student-resume", str(place.teacher), "--evaluate", data=data)


CASES = [
    Case("an image file without content", lambda p: p.base(data=with_image(p, "bad.jpg", b"")), process=True),
    Case("the first half of an image", halves),
    Case("a web page called .jpg", lambda p: p.base(data=with_image(p, "page.jpg", b"<!DOCTYPE html><html></html>"))),
    Case(
        "a head that promises 100,000 x 100,000 px",
        lambda p: p.base(data=with_image(p, "bomb.ppm", b"P6 100000 100000 255\n")),
    ),
    Case("a strip of 1 x 60,000 px, which resized would fill the memory", strip),
    Case("an image of numbers that are not finite", not_a_number),
    Case("an image of numbers beyond 16 bits", deep),
    Case("a link to an image that is gone", link),
    Case("a pipe in the place of an image", pipe),
    Case(
        "a PostScript drawing called .jpg",
        lambda p: p.base(data=with_image(p, "eps.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n\n")),
    ),
    Case(
        "a broken image with a line end in its name",
        lambda p: p.base(data=with_image(p, "two\nlines.png", b"not an image")),
    ),
    Case(
        "a broken image, met while images are decoded into memory",
        lambda p: p.base(
            "--cache", "ram", data=with_image(p, "lfs.png", b"version https://git-lfs.github.com/spec/v1\n")
        ),
    ),
    Case(
        "a broken image, met by a loading process",
        lambda p: p.base("-j", "1", data=with_image(p, "zeros.png", bytes(5000))),
    ),
    Case("a broken image in valid/, at an evaluation", evaluated),
    Case("images without labels, and a link to the folder that it lies in", loop, main_mgd),
    Case(
        "--bad-images skip, and every image of a class is broken",
        lambda p: p.base("--bad-images", "skip", data=emptied(p, "train", "dot")),
        process=True,
    ),
    Case(
        "--bad-images skip, and all of valid/ is broken",
        lambda p: p.base("--bad-images", "skip", data=emptied(p, "valid")),
    ),
    Case(
        "--bad-images skip, and all images without labels are broken",
        lambda p: p.distil("--bad-images", "skip", "--labels", "0", "--distiller", "kd", data=emptied(p, "train")),
        main_mgd,
    ),
]
