from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from classification import main_base
from classification.data.cache import Cache
from classification.data.images import find_unreadable, image_size, read_image
from classification.errors import UserError
from tests.classification.conftest import SMALL, TEACHER, write_photos

RED = np.zeros((4, 6, 3), dtype=np.uint8)
RED[..., 0] = 200


def saved(image: Image.Image, path: Path, **options: Any) -> str:
    image.save(path, **options)
    return str(path)


def colour(path: str) -> list[int]:
    image = read_image(path)
    assert image.mode == "RGB"
    return [int(v) for v in np.asarray(image).reshape(-1, 3).mean(0).round()]


def test_every_kind_of_photograph_is_converted(tmp_path: Path) -> None:
    red = Image.fromarray(RED)
    assert colour(saved(red, tmp_path / "rgb.png")) == [200, 0, 0]
    assert colour(saved(red.convert("P"), tmp_path / "palette.png"))[1:] == [0, 0]
    assert colour(saved(red.convert("L"), tmp_path / "grey.png")) == [60, 60, 60]
    assert colour(saved(red.convert("1"), tmp_path / "bilevel.png"))[0] in range(256)
    assert np.allclose(colour(saved(red.convert("CMYK"), tmp_path / "cmyk.jpg", quality=100)), [200, 0, 0], atol=4)
    deep = Image.fromarray(np.full((4, 6), 25_700, dtype=np.uint16))
    assert colour(saved(deep, tmp_path / "deep.png")) == [100, 100, 100]
    assert colour(saved(deep, tmp_path / "deep.tif")) == [100, 100, 100]
    for most in (1, 255):  # whole numbers or parts of one
        measured = Image.fromarray(np.linspace(0, most, 24, dtype=np.float32).reshape(4, 6))
        assert np.allclose(colour(saved(measured, tmp_path / "measured.tif")), 127, atol=1)
    clear = Image.new("RGBA", (6, 4), (200, 0, 0, 0))
    assert colour(saved(clear, tmp_path / "clear.png")) == [255, 255, 255]
    half = Image.new("LA", (6, 4), (0, 128))
    assert colour(saved(half, tmp_path / "half.png")) == [127, 127, 127]
    frames = [Image.new("RGB", (6, 4), c) for c in ("red", "blue")]
    assert colour(saved(frames[0], tmp_path / "moving.gif", save_all=True, append_images=frames[1:])) == [255, 0, 0]
    assert read_image(saved(red.resize((1, 1)), tmp_path / "dot.png")).size == (1, 1)


def test_a_turned_photograph_is_set_upright_also_in_a_cache(tmp_path: Path) -> None:
    left = RED.copy()
    left[:, 3:] = 0
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    path = saved(Image.fromarray(left), tmp_path / "turned.png", exif=exif)
    image = np.asarray(read_image(path))
    assert image.shape == (6, 4, 3) and image_size(path) == (6, 4)
    assert image[:3, :, 0].all() and not image[3:].any()
    assert np.array_equal(np.asarray(Cache([(path, 0)], read_image)[0]), image)


def write_broken(folder: Path) -> list[str]:
    whole = folder / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(whole)
    content = whole.read_bytes()
    bomb = content[:16] + (60_000).to_bytes(4, "big") * 2 + content[24:]  # the head's width and height
    files = {
        "truncated.png": content[: len(content) // 2],
        "empty.jpg": b"",
        "text.jpg": b"not an image",
        "head.png": content[:20],
        "bomb.png": bomb,
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "folder.png").mkdir()
    return [str(folder / name) for name in (*files, "folder.png")]


def test_broken_images_are_named(tmp_path: Path) -> None:
    broken = write_broken(tmp_path)
    for path in broken:
        with pytest.raises(UserError, match=f"image {path} cannot be read"):
            read_image(path)
    assert set(find_unreadable([*broken, str(tmp_path / "whole.png")], 2)) == set(broken)


def test_broken_images_stop_the_run_or_are_left_out_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_photos(tmp_path / "photos", train=5, valid=2)
    broken = [path for path in write_broken(root / "train" / "dot") if not path.endswith("folder.png")]
    (root / "train" / "dot" / "whole.png").unlink()
    (root / "valid" / "sky" / "bad.png").write_bytes(b"")
    words = [str(root), "-a", TEACHER, *SMALL, "--epochs", "1", "--output"]
    assert main_base.main([*words, str(tmp_path / "stop")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main_base.main([*words, str(tmp_path / "skip"), "--bad-images", "skip"]) == 0
    listed = (tmp_path / "skip" / "bad_images.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == sorted([*broken, str(root / "valid" / "sky" / "bad.png")])
    for path in (root / "train" / "dot").glob("[0-9]*.png"):
        path.write_bytes(b"")
    assert main_base.main([*words, str(tmp_path / "none"), "--bad-images", "skip"]) == 2
    assert "no image of dot can be read" in capsys.readouterr().err


def test_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_photos(tmp_path / "photos", train=4, valid=1)
    folder = root / "train" / "dot"
    (folder / "0.png").rename(folder / "a name\nof two lines \u2603 \udcff.png")
    words = [str(root), "-a", TEACHER, *SMALL, "--epochs", "1", "--output", str(tmp_path / "run")]
    assert main_base.main(words) == 0
    (folder / "bad\udcff.png").write_bytes(b"")
    assert main_base.main([*words[:-1], str(tmp_path / "other"), "--bad-images", "skip"]) == 0
    assert b"bad\xff.png" in (tmp_path / "other" / "bad_images.txt").read_bytes()


@pytest.mark.parametrize("kind", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_cache_takes_photographs_turned_in_every_way(orientation: int, kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    path = saved(Image.fromarray(pixels), tmp_path / f"turned.{kind}", exif=exif)
    image = np.asarray(read_image(path))
    assert image.shape == ((6, 4, 3) if orientation > 4 else (4, 6, 3)) and image_size(path) == image.shape[:2]
    assert np.array_equal(np.asarray(Cache([(path, 0)], read_image)[0]), image)


def test_a_colour_that_stands_for_transparency_is_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4), (200, 0, 0))
    assert colour(saved(image, tmp_path / "rgb.png", transparency=(200, 0, 0))) == [255, 255, 255]
    assert colour(saved(image.convert("P"), tmp_path / "p.png", transparency=image.convert("P").getpixel((0, 0)))) == [
        255,
        255,
        255,
    ]


def tiff(path: Path, values: np.ndarray, bits: int, kind: int) -> str:
    """Write a grey TIFF, by hand: Pillow writes no 12 bits and no unsigned 32 bits."""
    width, height = values.shape[1], values.shape[0]
    data = values.tobytes() if bits != 12 else bytes(
        byte for a, b in values.reshape(-1, 2).tolist() for byte in (a >> 4, (a & 15) << 4 | b >> 8, b & 255)
    )  # fmt: skip
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(data)), (339, kind)]
    table = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack("<H", len(tags)) + table + bytes(4))
    return str(path)


def grey(path: str) -> list[int]:
    return np.asarray(read_image(path))[..., 0].ravel().tolist()


def test_grey_of_more_than_8_bits_is_scaled_by_what_the_file_declares(tmp_path: Path) -> None:
    row = np.array([[0, 257, 300, 65535]], dtype=np.uint16)  # / 257
    for name in ("a.png", "a.tif"):
        assert grey(saved(Image.fromarray(row), tmp_path / name)) == [0, 1, 1, 255]
    dark = np.array([[0, 100, 200, 255]], dtype=np.uint16)  # nearly black, not a photograph of 8 bits
    assert grey(saved(Image.fromarray(dark), tmp_path / "dark.png")) == [0, 0, 0, 0]
    for content, expected in (((0, 65535, 514, 200), [0, 255, 2, 0]),):
        (tmp_path / "a.pgm").write_bytes(b"P5 4 1 65535\n" + struct.pack(">4H", *content))
        assert grey(str(tmp_path / "a.pgm")) == expected
    (tmp_path / "b.pgm").write_bytes(b"P5 2 1 1000\n" + struct.pack(">2H", 1000, 500))
    assert grey(str(tmp_path / "b.pgm")) == [255, 127]
    big = tmp_path / "big.tif"
    big.write_bytes(struct.pack(">2sHI4H", b"MM", 42, 16, 0, 514, 257, 65535) + struct.pack(">H", 9) + b"".join(
        struct.pack(">HHIHH", tag, 3, 1, value, 0)
        for tag, value in ((256, 4), (257, 1), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 8))
    ) + bytes(4))  # fmt: skip
    assert grey(str(big)) == [0, 2, 1, 255]
    twelve = np.array([[0, 4095, 2048, 16]], dtype=np.uint16)  # * 255 / 4095
    assert grey(tiff(tmp_path / "12.tif", twelve, 12, 1)) == [0, 255, 127, 0]
    signed = np.array([[0, 257, 32767, 300]], dtype=np.int16)
    assert grey(tiff(tmp_path / "16.tif", signed, 16, 2)) == [0, 1, 127, 1]
    clear = tmp_path / "clear.png"
    assert grey(saved(Image.fromarray(row), clear, transparency=257)) == [0, 255, 1, 255]


def test_grey_of_32_bits_is_scaled_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    whole = "expected 0 to 255 or 0 to 65535"
    parts = "expected 0 to 1 or 0 to 255"
    cases: list[tuple[np.ndarray, int, int, list[int] | str]] = [
        (np.array([[0, 7, 255, 3]], np.int32), 32, 2, [0, 7, 255, 3]),
        (np.array([[0, 257, 65535, 600]], np.int32), 32, 2, [0, 1, 255, 2]),
        (np.array([[0, 257, 65535, 600]], np.uint32), 32, 1, [0, 1, 255, 2]),
        (np.array([[0, 0, 65536, 0]], np.int32), 32, 2, f"values go from 0 to 65536; {whole}"),
        (np.array([[0, 0, -1, 0]], np.int32), 32, 2, f"values go from -1 to 0; {whole}"),
        (np.array([[0, 0, 2**31, 0]], np.uint32), 32, 1, whole),
        (np.array([[0, 0, -5, 0]], np.int16), 16, 2, f"values go from -5 to 0; {whole}"),
        (np.array([[0, 0.5, 1, 0.1]], np.float32), 32, 3, [0, 127, 255, 25]),
        (np.array([[0, 0.5, 255, 128.2]], np.float32), 32, 3, [0, 0, 255, 128]),
        (np.array([[0, 0, 255.5, 0]], np.float32), 32, 3, f"values go from 0 to 255.5; {parts}"),
        (np.array([[0, 0, -0.5, 1]], np.float32), 32, 3, f"values go from -0.5 to 1; {parts}"),
        (np.array([[0, 0, np.inf, 1]], np.float32), 32, 3, "values that are not finite"),
    ]
    for values, bits, kind, expected in cases:
        tiff(path, values, bits, kind)
        if isinstance(expected, list):
            assert grey(str(path)) == expected
        else:
            with pytest.raises(UserError, match=expected):
                read_image(str(path))
