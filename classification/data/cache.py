"""Decoded images in memory that the loading processes, and the ranks of one machine, share."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from classification.data.images import image_size, to_bytes
from classification.data.samples import Sample
from classification.errors import UserError
from classification.system.memory import free_bytes

SHARED = Path("/dev/shm")  # a file system in memory


class LocalRanks(Protocol):
    """The ranks on this machine: the number of this one among them, and a way to exchange values."""

    @property
    def number(self) -> int: ...
    def gather(self, value: Any) -> list[Any]: ...


@dataclass(frozen=True)
class SingleRank:
    """A single rank, without others on its machine."""

    number: int = 0

    def gather(self, value: Any) -> list[Any]:
        """Return the value in a list."""
        return [value]


SINGLE_RANK = SingleRank()


class Cache:
    """All decoded images of a split in one block of bytes, which processes share instead of copying.

    The ranks of one machine share a block, and each decodes a part of the images. A rank that cannot see the memory of
    the first rank, for example in another container, fills its own block.

    Args:
        samples: (path, class index) of every image.
        read: path -> RGB image; its errors pass through.
        free: bytes of free memory; by default, those that the system reports.
        ranks: the ranks of this machine; all of them must create the cache at the same time.

    Raises:
        UserError: the images need more memory than is free, or an image cannot be read. It is raised on every rank.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        read: Callable[[str], Image.Image],
        free: int | None = None,
        ranks: LocalRanks = SINGLE_RANK,
    ) -> None:
        self.sizes = _image_sizes(samples, ranks)
        self.ends = np.cumsum(3 * self.sizes.prod(1))
        num_bytes = int(self.ends[-1])
        _check_memory(num_bytes, len(samples), free, ranks)
        shared = None if len(ranks.gather(None)) == 1 else _machine_block(num_bytes, ranks)
        self.bytes = _process_block(num_bytes) if shared is None else shared
        first, step = _decoding_share(shared is not None, ranks)

        def decode(index: int) -> None:
            self[index].copy_(to_bytes(read(samples[index][0])))

        def work() -> None:
            with ThreadPoolExecutor(-(-(os.cpu_count() or 1) // step) + 1) as pool:
                for _ in pool.map(decode, range(first, len(samples), step)):
                    pass

        _raise_on_all_ranks(work, ranks)

    def __getitem__(self, index: int) -> Tensor:
        """Return an image as (height, width, 3) bytes, a view of the block."""
        height, width = map(int, self.sizes[index])
        end = int(self.ends[index])
        return self.bytes[end - 3 * height * width : end].view(height, width, 3)


def _image_sizes(samples: Sequence[Sample], ranks: LocalRanks) -> Any:
    """Return heights and widths, (N, 2); each rank opens a part of the files."""
    count = len(ranks.gather(None))
    own = [image_size(samples[index][0]) for index in range(ranks.number, len(samples), count)]
    sizes = np.zeros((len(samples), 2), np.int64)
    for number, part in enumerate(ranks.gather(own)):
        if part:
            sizes[number::count] = part
    return sizes


def _check_memory(num_bytes: int, num_images: int, free: int | None, ranks: LocalRanks) -> None:
    """Raise UserError on every rank if the images need too much memory on any of them."""

    def compare() -> None:
        available = free_bytes() if free is None else free
        if num_bytes > 0.8 * available:
            raise UserError(
                f"--cache ram needs {num_bytes / 2**30:.1f} GiB for {num_images} decoded images, but only "
                f"{available / 2**30:.1f} GiB of memory are free: make smaller copies of the images with mgd prepare, "
                "or use --cache off"
            )

    _raise_on_all_ranks(compare, ranks)


def _raise_on_all_ranks(work: Callable[[], None], ranks: LocalRanks) -> None:
    """Do this rank's work; a UserError on one rank is raised on all, because the others would wait for that rank."""
    cause = ""
    try:
        work()
    except UserError as error:
        cause = str(error)
    if fault := next(filter(None, ranks.gather(cause)), ""):
        raise UserError(fault)


def _shared_memory_error(num_bytes: int) -> UserError:
    return UserError(
        f"--cache ram needs {num_bytes / 2**30:.1f} GiB of shared memory, but {SHARED} has less: give the container "
        "more (--shm-size), or use --cache off"
    )


def _process_block(num_bytes: int) -> Tensor:
    """Return memory that this process shares with its loading processes."""
    try:
        block: Tensor = torch.empty(num_bytes, dtype=torch.uint8).share_memory_()
        return block
    except RuntimeError as error:
        raise _shared_memory_error(num_bytes) from error


def _machine_block(num_bytes: int, ranks: LocalRanks) -> Tensor | None:
    """Return memory that the ranks of this machine share, or None on a rank that cannot see it.

    The memory is a file that is deleted when all ranks have opened it. So it is freed when the last of them ends, even
    if that one is killed.
    """
    file = SHARED / f"mgd-{uuid.uuid4().hex}"
    creates = ranks.number == 0 and SHARED.is_dir()

    def make() -> None:
        if creates:
            try:
                _reserve(file, num_bytes)
            except OSError as error:
                file.unlink(missing_ok=True)
                raise _shared_memory_error(num_bytes) from error

    _raise_on_all_ranks(make, ranks)
    file = ranks.gather(file)[0]
    try:
        block: Tensor | None = None
        if file.exists():
            block = torch.from_file(str(file), shared=True, size=num_bytes, dtype=torch.uint8)
        ranks.gather(None)  # waits until all have opened it
        return block
    finally:
        if creates:
            file.unlink(missing_ok=True)


def _reserve(file: Path, num_bytes: int) -> None:
    """Create a file and reserve its memory: writing to memory that is not there would kill the process."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    finally:
        os.close(descriptor)


def _decoding_share(shares: bool, ranks: LocalRanks) -> tuple[int, int]:
    """Return the first index that this rank decodes, and the step to the next."""
    sharing = [number for number, own in enumerate(ranks.gather(shares)) if own]
    return (sharing.index(ranks.number), len(sharing)) if shares else (0, 1)
