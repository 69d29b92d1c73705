"""Read image files as RGB, or say in one sentence why a file cannot be read."""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from classification.data.image_files import HEIF
from classification.data.members import file_size, open_image
from classification.data.metadata import without_metadata
from classification.errors import UserError

Result = TypeVar("Result")
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
ORIENTATION = 0x0112
EXIF_PART, TAKEN, MODIFIED = 0x8769, 0x9003, 0x0132  # EXIF tags: sub-directory, in it the time of the shot; last change
UPRIGHT: dict[object, Image.Transpose] = {  # EXIF orientation -> the operation that sets a photograph upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
VECTOR_FORMATS = ("EPS", "WMF")  # Pillow would start other programs to draw them
MAX_PROPORTION = 500  # times the short side; when the short side is resized, a thinner strip would fill the memory
BITS = 258  # TIFF tag: bits per sample
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def read_image(path: str) -> Image.Image:
    """Read an image file as RGB, upright.

    Palette and CMYK images are converted, transparent images are laid over white, and of an animation the first picture
    is used. 16-bit grey values are divided by 257. 32-bit grey values must lie in 0 to 255 or 0 to 65535, fractional
    ones in 0 to 1 or 0 to 255. If the metadata is broken, it is ignored, and an unknown orientation means upright.

    Raises:
        UserError: the file cannot be read; the message names it.
    """
    try:
        return _read_rgb(path)
    except Exception as error:  # a broken file may raise anything
        raise UserError(
            f"image {path} cannot be read ({_describe_error(path, error)}): repair or remove it, or leave such images "
            "out with --bad-images skip"
        ) from error


def read_image_or_cause(path: str) -> Image.Image | str:
    """Read an image as `read_image` does; if it cannot be read, return the cause instead of raising."""
    try:
        return _read_rgb(path)
    except Exception as error:  # a broken file may raise anything
        return _describe_error(path, error)


def to_bytes(image: Image.Image) -> Tensor:
    """Return an RGB image as (height, width, 3) bytes."""
    return torch.from_numpy(np.array(image))


def _read_rgb(path: str) -> Image.Image:
    return _apply(path, _decode)


def _apply(path: str, work: Callable[[Image.Image], Result]) -> Result:
    """Apply `work` to an opened image; if that fails, to the same image without its metadata."""
    with open_image(path) as file:
        try:
            with _open(file) as image:
                return work(image)
        except Exception:
            if not file.seekable():
                raise
            file.seek(0)
            if (stripped := without_metadata(file)) is None:
                raise
            try:
                with Image.open(io.BytesIO(stripped)) as image:
                    return work(image)
            except Exception:
                pass  # the first error says more
            raise


def _open(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        if not file.seekable():
            raise
        file.seek(0)
        head = file.read(12)
        if head[4:8] != b"ftyp" or head[8:] not in HEIF_BRANDS:
            raise
    if not has_heif():
        raise ValueError("it is HEIC: `pip install pillow-heif` to read it")
    importlib.import_module("pillow_heif").register_heif_opener()
    file.seek(0)
    return Image.open(file)


def has_heif() -> bool:
    """Return whether HEIC images can be read."""
    return importlib.util.find_spec("pillow_heif") is not None


def is_heif(path: str) -> bool:
    """Return whether a file name is that of a HEIC image."""
    return path.lower().endswith(HEIF)


def _decode(image: Image.Image) -> Image.Image:
    if image.format in VECTOR_FORMATS:
        raise ValueError("it is a drawing, not a photograph")
    if min(image.size) < 1 or max(image.size) > MAX_PROPORTION * min(image.size):
        raise ValueError(f"it is {image.width} x {image.height} px")
    image.load()
    # `_rgb` would copy an image that is RGB already.
    rgb = image if image.mode == "RGB" and "transparency" not in image.info else _rgb(image)
    turn = UPRIGHT.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> object:
    """Return the orientation by EXIF; 1, upright, if that cannot be read."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken metadata may raise anything
        return 1


def _describe_error(path: str, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is in no known image format" if file_size(path) else "it is empty"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey_bytes(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _grey_bytes(image: Image.Image) -> NDArray[np.uint8]:
    """Convert grey values of more than 8 bits to bytes."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it contains values that are not finite")
    low, high = values.min(), values.max()
    white = next((white for white in _white_levels(image) if high <= white), None)
    if low < 0 or white is None:
        expected = " or 0 to ".join(map(str, _white_levels(image)))
        raise ValueError(f"its values go from {low:.6g} to {high:.6g}; expected 0 to {expected}")
    if isinstance(transparent := image.info.get("transparency"), int):
        values[values == transparent] = white
    return (values * 255 / white).astype(np.uint8)


def _white_levels(image: Image.Image) -> tuple[int, ...]:
    """Return the values that may stand for white in a file of this kind: the first that no pixel exceeds is used."""
    if image.mode == "F":
        return 1, 255
    if image.format == "TIFF":
        bits, *_ = image.tag_v2.get(BITS, (0,))  # type: ignore[attr-defined]
        if image.mode.startswith("I;16"):
            return (2**bits - 1,) if 8 < bits < 16 else (65535,)
        return 255, 65535  # 32 bits, or signed 16 bits
    return (65535,)  # PNG, PPM and JPEG 2000 of 9 to 16 bits


def image_size(path: str) -> tuple[int, int]:
    """Return height and width of what `read_image` returns, from the file's header; 1, 1 if it cannot be read."""
    try:
        with open_image(path) as file, _open(file) as image:
            turned = image.getexif().get(ORIENTATION) in SIDEWAYS
            if turned and image.format == "TIFF":  # versions of Pillow differ in whether `size` is turned already
                return ImageOps.exif_transpose(image).size[::-1]
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:
        try:
            return _read_rgb(path).size[::-1]  # the header is broken, but the pixels may not be
        except Exception:
            return 1, 1  # `read_image` says what is wrong


def time_taken(path: str) -> datetime | None:
    """Return when a photograph was taken by its EXIF data; None if they do not say."""
    try:
        with open_image(path) as file, _open(file) as image:
            exif = image.getexif()
            text = exif.get_ifd(EXIF_PART).get(TAKEN) or exif.get(MODIFIED)
            return datetime.strptime(str(text).strip("\0 "), "%Y:%m:%d %H:%M:%S")
    except Exception:  # broken metadata may raise anything
        return None


def find_unreadable(paths: list[str], workers: int) -> dict[str, str]:
    """Read every file; return {path: cause} of those that cannot be read."""

    def cause_of(path: str) -> str:
        image = read_image_or_cause(path)
        return image if isinstance(image, str) else ""

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        return {path: cause for path, cause in zip(paths, pool.map(cause_of, paths), strict=True) if cause}
