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
from classification.errors import UserError
from classification.system.memory import free_bytes

Sample = tuple[str, int]
SHARED = Path("/dev/shm")  # a file system in memory


class Near(Protocol):
    """The ranks on this machine: the number of this one among them, and a way to exchange values."""

    @property
    def number(self) -> int: ...
    def gather(self, value: Any) -> list[Any]: ...


@dataclass(frozen=True)
class Alone:
    """A single rank, without others on its machine."""

    number: int = 0

    def gather(self, value: Any) -> list[Any]:
        """Return the value in a list."""
        return [value]


ALONE = Alone()


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
        near: Near = ALONE,
    ) -> None:
        self.sizes = _sizes(samples, near)
        self.ends = np.cumsum(3 * self.sizes.prod(1))
        need = int(self.ends[-1])
        _check(need, len(samples), free, near)
        shared = None if len(near.gather(None)) == 1 else _shared(need, near)
        self.bytes = _alone(need) if shared is None else shared
        first, step = _part(shared is not None, near)

        def decode(index: int) -> None:
            self[index].copy_(to_bytes(read(samples[index][0])))

        def work() -> None:
            with ThreadPoolExecutor(-(-(os.cpu_count() or 1) // step) + 1) as pool:
                for _ in pool.map(decode, range(first, len(samples), step)):
                    pass

        _together(work, near)

    def __getitem__(self, index: int) -> Tensor:
        """Return an image as (height, width, 3) bytes, a view of the block."""
        height, width = map(int, self.sizes[index])
        end = int(self.ends[index])
        return self.bytes[end - 3 * height * width : end].view(height, width, 3)


def _sizes(samples: Sequence[Sample], near: Near) -> Any:
    """Return heights and widths, (N, 2); each rank opens a part of the files."""
    count = len(near.gather(None))
    own = [image_size(samples[index][0]) for index in range(near.number, len(samples), count)]
    sizes = np.zeros((len(samples), 2), np.int64)
    for number, part in enumerate(near.gather(own)):
        if part:
            sizes[number::count] = part
    return sizes


def _check(need: int, num: int, free: int | None, near: Near) -> None:
    """Raise UserError on every rank if the images need too much memory on any of them."""

    def compare() -> None:
        room = free_bytes() if free is None else free
        if need > 0.8 * room:
            raise UserError(
                f"--cache ram needs {need / 2**30:.1f} GiB for {num} decoded images, but only {room / 2**30:.1f} "
                "GiB of memory are free: make smaller copies of the images with prepare.py, or use --cache off"
            )

    _together(compare, near)


def _together(work: Callable[[], None], near: Near) -> None:
    """Do this rank's work; a UserError on one rank is raised on all, because the others would wait for that rank."""
    cause = ""
    try:
        work()
    except UserError as error:
        cause = str(error)
    if fault := next(filter(None, near.gather(cause)), ""):
        raise UserError(fault)


def _no_room(need: int) -> UserError:
    return UserError(
        f"--cache ram needs {need / 2**30:.1f} GiB of shared memory, but {SHARED} has less: give the container more "
        "(--shm-size), or use --cache off"
    )


def _alone(need: int) -> Tensor:
    """Return memory that this process shares with its loading processes."""
    try:
        block: Tensor = torch.empty(need, dtype=torch.uint8).share_memory_()
        return block
    except RuntimeError as error:
        raise _no_room(need) from error


def _shared(need: int, near: Near) -> Tensor | None:
    """Return memory that the ranks of this machine share, or None on a rank that cannot see it.

    The memory is a file that is deleted when all ranks have opened it. So it is freed when the last of them ends, even
    if that one is killed.
    """
    file = SHARED / f"mgd-{uuid.uuid4().hex}"
    made = near.number == 0 and SHARED.is_dir()

    def make() -> None:
        if made:
            try:
                _reserve(file, need)
            except OSError as error:
                file.unlink(missing_ok=True)
                raise _no_room(need) from error

    _together(make, near)
    file = near.gather(file)[0]
    try:
        block: Tensor | None = None
        if file.exists():
            block = torch.from_file(str(file), shared=True, size=need, dtype=torch.uint8)
        near.gather(None)  # waits until all have opened it
        return block
    finally:
        if made:
            file.unlink(missing_ok=True)


def _reserve(file: Path, need: int) -> None:
    """Create a file and reserve its memory: writing to memory that is not there would kill the process."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, need)
    finally:
        os.close(descriptor)


def _part(shares: bool, near: Near) -> tuple[int, int]:
    """Return the first index that this rank decodes, and the step to the next."""
    sharing = [number for number, own in enumerate(near.gather(shares)) if own]
    return (sharing.index(near.number), len(sharing)) if shares else (0, 1)
