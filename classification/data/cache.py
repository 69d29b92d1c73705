"""Decoded photographs in memory, shared by the loading processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from classification.data.images import image_size, to_bytes
from classification.errors import UserError

Sample = tuple[str, int]


class Cache:
    """Every image of a split as one block of bytes, which processes share instead of copying.

    Args:
        samples: (path, class index) of every image.
        read: path -> RGB image; its errors pass through.
        free: bytes of memory that are free; what the system says by default.

    Raises:
        UserError: the images need more memory than is free.
    """

    def __init__(self, samples: list[Sample], read: Callable[[str], Image.Image], free: int | None = None) -> None:
        self.sizes = np.array([image_size(path) for path, _ in samples])  # (N, 2): height, width
        self.ends = np.cumsum(3 * self.sizes.prod(1))
        need, free = int(self.ends[-1]), _free_bytes() if free is None else free
        if need > 0.8 * free:
            raise UserError(
                f"--cache ram needs {need / 2**30:.1f} GiB for {len(samples)} decoded images, and "
                f"{free / 2**30:.1f} GiB of memory are free: shrink copies of the images first, by "
                "prepare.py, or give --cache off"
            )
        try:
            self.bytes: Tensor = torch.empty(need, dtype=torch.uint8).share_memory_()
        except RuntimeError as error:
            raise UserError(
                f"--cache ram needs {need / 2**30:.1f} GiB of shared memory, and /dev/shm has less: give the container "
                "more of it (--shm-size), or give --cache off"
            ) from error

        def decode(index: int) -> None:
            self[index].copy_(to_bytes(read(samples[index][0])))

        with ThreadPoolExecutor() as pool:
            for _ in pool.map(decode, range(len(samples))):
                pass

    def __getitem__(self, index: int) -> Tensor:
        """Return (height, width, 3) bytes, a view."""
        height, width = map(int, self.sizes[index])
        end = int(self.ends[index])
        return self.bytes[end - 3 * height * width : end].view(height, width, 3)


def _free_bytes() -> int:
    """Memory that can be had without swapping; where the system does not say, half of what there is."""
    try:
        with Path("/proc/meminfo").open() as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
