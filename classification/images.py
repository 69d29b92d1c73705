"""Image files as RGB: every kind that photographs come in, and one sentence where a file is none."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from classification.errors import UserError

TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange the sides
ORIENTATION = 0x0112
DRAWINGS = ("EPS", "WMF")  # Pillow has other programs run them
LONGEST = 500  # times the short side; resized by its short side, a thinner strip would fill the memory


def read_image(path: str) -> Image.Image:
    """Read an image file as RGB, upright.

    Grey, palette and CMYK are converted, 16 bits a channel scaled to 8, transparency laid over white; of an animation
    the first picture counts.

    Raises:
        UserError: naming the file.
    """
    try:
        return _read(path)
    except Exception as error:  # a broken file raises whatever its broken bytes happen to mean
        raise UserError(
            f"image {path} cannot be read ({_cause(path, error)}): mend or remove it, or leave such images out by "
            "--bad-images skip"
        ) from error


def to_bytes(image: Image.Image) -> Tensor:
    """Return an RGB image as (height, width, 3) bytes."""
    return torch.from_numpy(np.array(image))


def _read(path: str) -> Image.Image:
    with _file(path) as file, Image.open(file) as image:
        if image.format in DRAWINGS:
            raise ValueError("it is a drawing, not a photograph")
        if min(image.size) < 1 or max(image.size) > LONGEST * min(image.size):
            raise ValueError(f"it is {image.width} x {image.height} px")
        image.load()
        # Both would copy what is right already.
        upright = ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
        return upright if upright.mode == "RGB" and "transparency" not in image.info else _rgb(upright)


def _cause(path: str, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is of no kind that is known" if Path(path).stat().st_size else "it is empty"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _file(path: str) -> BinaryIO:
    """Open a file; a pipe, which would be waited for, is empty."""
    at_once = getattr(os, "O_NONBLOCK", 0)
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        scale = 257 if image.mode.startswith("I;16") or values.max() > 255 else 1
        if image.mode == "F" and values.max() <= 1:  # parts of one, not of 255
            scale = 1 / 255
        return Image.fromarray((values / scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def image_size(path: str) -> tuple[int, int]:
    """Return height and width of what `read_image` will return, from the file's head; 1, 1 where it cannot be read."""
    try:
        with _file(path) as file, Image.open(file) as image:
            turned = image.getexif().get(ORIENTATION) in TURNED
            if turned and image.format == "TIFF":  # some versions of Pillow turn the size that they tell, others do not
                return ImageOps.exif_transpose(image).size[::-1]
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:
        return 1, 1  # reading it will say what is wrong


def unreadable(paths: list[str], workers: int) -> dict[str, str]:
    """Read every file; return those that cannot be read, and why."""

    def why(path: str) -> str:
        try:
            _read(path)
        except Exception as error:
            return _cause(path, error)
        return ""

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        return {path: text for path, text in zip(paths, pool.map(why, paths), strict=True) if text}
