"""Find near copies of images by perceptual hashes: other sizes, formats or qualities, and mirrored copies."""

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


def perceptual_hash(image: Image.Image) -> int:
    """Return the 64 bits of `imagehash.phash`, which hardly change with size, format and quality."""
    return int.from_bytes(np.packbits(imagehash.phash(image).hash.reshape(-1)).tobytes(), "big")


class NearCopies:
    """An index of originals, to find images whose hash differs from that of an original in at most `distance` bits.

    Hashes are divided into `distance` + 1 parts. Two near hashes have at least one equal part (pigeonhole principle),
    so only hashes with an equal part are compared.

    Args:
        paths: of the originals; their mirrored versions are included.
        distance: largest number of different bits of a copy.
        workers: number of threads that read images.
    """

    def __init__(self, paths: Sequence[str], distance: int = 4, workers: int = 1) -> None:
        self.distance, self.workers = distance, workers
        edges = np.linspace(0, BITS, distance + 2).astype(int).tolist()
        self._bit_ranges = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
        self._index: list[dict[int, list[tuple[int, str]]]] = [defaultdict(list) for _ in self._bit_ranges]
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            for path, hashes in zip(paths, pool.map(_hashes_with_mirrored, paths), strict=True):
                for value in hashes:
                    for bucket, part in zip(self._index, self._split(value), strict=True):
                        bucket[part].append((value, path))

    def _split(self, value: int) -> list[int]:
        return [(value >> low) & mask for low, mask in self._bit_ranges]

    def originals_of(self, paths: Iterable[str]) -> dict[str, str]:
        """Return {path: original} of the paths that are near copies; unreadable files are none."""
        originals = {}
        paths = list(paths)
        with ThreadPoolExecutor(max(self.workers, 1)) as pool:
            for path, value in zip(paths, pool.map(_hash_of_file, paths), strict=True):
                if value is not None and (original := self._nearest(value)) is not None:
                    originals[path] = original
        return originals

    def _nearest(self, value: int) -> str | None:
        candidates = [
            ((value ^ other).bit_count(), path)
            for bucket, part in zip(self._index, self._split(value), strict=True)
            for other, path in bucket.get(part, ())
        ]
        distance, path = min(candidates, default=(BITS, ""))
        return path if distance <= self.distance else None


def _hash_of_file(path: str) -> int | None:
    image = read_image_or_cause(path)
    return None if isinstance(image, str) else perceptual_hash(image)


def _hashes_with_mirrored(path: str) -> list[int]:
    image = read_image_or_cause(path)
    return [] if isinstance(image, str) else [perceptual_hash(image), perceptual_hash(ImageOps.mirror(image))]
