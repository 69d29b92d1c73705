"""Small pictures as data URIs: photographs, channel maps, cost matrices."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from classification.data.images import read_image_or_cause
from classification.runs.matchings import closeness

LEVELS = 32  # colours of a matrix or a map; more cannot be told apart, and make the file larger
POSITIVE, NEGATIVE, COST = (208, 60, 40), (40, 104, 200), (45, 130, 225)

Array = NDArray[np.float64]


def photograph(path: str, side: int) -> str | None:
    """Return a photograph as a JPEG with sides of at most `side` pixels; None if it cannot be read."""
    image = read_image_or_cause(path)
    if isinstance(image, str):
        return None
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return _uri("jpeg", buffer.getvalue())


def channel_map(values: Array) -> str:
    """Return a map (H, W) as a PNG: red above zero, blue below; zero is transparent, for light and dark backgrounds."""
    half = LEVELS // 2 - 1
    top = float(np.abs(values).max()) or 1.0
    levels = np.rint(values / top * half).astype(np.int64) + half  # 0 ... 2 half
    colours = [(*(NEGATIVE if n < half else POSITIVE), round(255 * abs(n - half) / half)) for n in range(2 * half + 1)]
    return _palette(levels, colours)


def cost_matrix(cost: Array) -> str:
    """Return a cost matrix as a PNG: the lower the cost, the stronger the colour; the highest is transparent."""
    colours = [(*COST, round(255 * n / (LEVELS - 1))) for n in range(LEVELS)]
    return _palette(np.rint(closeness(cost) * (LEVELS - 1)).astype(np.int64), colours)


def _palette(levels: NDArray[np.int64], colours: Sequence[tuple[int, ...]]) -> str:
    image = Image.fromarray(levels.astype(np.uint8), "P")
    image.putpalette([value for colour in colours for value in colour[:3]])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes(colour[3] for colour in colours), optimize=True)
    return _uri("png", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
