"""Near copies of images, by perceptual hashes: the same picture in another size, format or quality, or mirrored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import imagehash
import numpy as np
from PIL import Image, ImageOps

from classification.data.images import read_image_or_cause

BITS = 64


def picture_hash(image: Image.Image) -> int:
    """Return 64 bits that hardly change with size, format and quality: those of `imagehash.phash`."""
    return int.from_bytes(np.packbits(imagehash.phash(image).hash.reshape(-1)).tobytes(), "big")


class NearCopies:
    """Find the pictures whose hash differs from one of these in at most `distance` bits.

    Of `distance` + 1 parts of such a hash one is the same (the pigeonhole principle), so only those are compared.

    Args:
        paths: of the pictures that are to have no copies; each counts mirrored as well.
        distance: bits.
        workers: threads that read.
    """

    def __init__(self, paths: Sequence[str], distance: int = 4, workers: int = 1) -> None:
        self.distance, self.workers = distance, workers
        edges = np.linspace(0, BITS, distance + 2).astype(int).tolist()
        self._parts = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
        self._known: list[dict[int, list[tuple[int, str]]]] = [defaultdict(list) for _ in self._parts]
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            for path, both in zip(paths, pool.map(_both_hashes, paths), strict=True):
                for value in both:
                    for known, part in zip(self._known, self._split(value), strict=True):
                        known[part].append((value, path))

    def _split(self, value: int) -> list[int]:
        return [(value >> low) & mask for low, mask in self._parts]

    def of(self, paths: Iterable[str]) -> dict[str, str]:
        """Return the original of each path that is a near copy; unreadable files have none."""
        found = {}
        paths = list(paths)
        with ThreadPoolExecutor(max(self.workers, 1)) as pool:
            for path, value in zip(paths, pool.map(_hash, paths), strict=True):
                if value is not None and (original := self._nearest(value)) is not None:
                    found[path] = original
        return found

    def _nearest(self, value: int) -> str | None:
        near = [
            ((value ^ other).bit_count(), path)
            for known, part in zip(self._known, self._split(value), strict=True)
            for other, path in known.get(part, ())
        ]
        distance, path = min(near, default=(BITS, ""))
        return path if distance <= self.distance else None


def _hash(path: str) -> int | None:
    image = read_image_or_cause(path)
    return None if isinstance(image, str) else picture_hash(image)


def _both_hashes(path: str) -> list[int]:
    image = read_image_or_cause(path)
    return [] if isinstance(image, str) else [picture_hash(image), picture_hash(ImageOps.mirror(image))]
