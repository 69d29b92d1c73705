"""Image files as RGB: every kind that photographs come in, and one sentence where a file is none."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps

from classification.errors import UserError

TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange the sides
ORIENTATION = 0x0112


def read_image(path: str) -> Image.Image:
    """Read an image file as RGB, upright.

    Grey, palette and CMYK are converted, 16 bits a channel scaled to 8, transparency laid over white; of an animation
    the first picture counts.

    Raises:
        UserError: naming the file.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a broken file raises whatever its broken bytes happen to mean
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split(" '")[0]
        raise UserError(
            f"image {path} cannot be read ({what or type(error).__name__}): mend or remove it, or leave such images "
            "out by --bad-images skip"
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        scale = 257 if image.mode.startswith("I;16") or values.max() > 255 else 1
        return Image.fromarray((values / scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def image_size(path: str) -> tuple[int, int]:
    """Return height and width of what `read_image` will return, from the file's head; 1, 1 where it cannot be read."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ORIENTATION) in TURNED
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:
        return 1, 1  # reading it will say what is wrong


def unreadable(paths: list[str], workers: int) -> dict[str, str]:
    """Read every file; return those that cannot be read, and why."""

    def why(path: str) -> str:
        try:
            read_image(path)
        except UserError as error:
            return str(error).partition("(")[2].rpartition(")")[0]
        return ""

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        return {path: text for path, text in zip(paths, pool.map(why, paths), strict=True) if text}
