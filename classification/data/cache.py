"""Decoded photographs in memory, shared by the loading processes, and by the ranks of one machine."""

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
SHARED = Path("/dev/shm")  # files there are memory


class Near(Protocol):
    """The ranks of this machine: the number of this one among them, and what each of them gives."""

    @property
    def number(self) -> int: ...
    def gather(self, value: Any) -> list[Any]: ...


@dataclass(frozen=True)
class Alone:
    """One rank."""

    number: int = 0

    def gather(self, value: Any) -> list[Any]:
        """Return what the one rank gives."""
        return [value]


ALONE = Alone()


class Cache:
    """Every image of a split as one block of bytes, which processes share instead of copying.

    Ranks of one machine have one block together, and each decodes its part of the images. A rank that does not see the
    memory of the first one, as in another container, has its own.

    Args:
        samples: (path, class index) of every image.
        read: path -> RGB image; its errors pass through.
        free: bytes of memory that are free; what the system says by default.
        near: the ranks of this machine, which all come here.

    Raises:
        UserError: the images need more memory than is free; on every rank, also where one cannot read an image.
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
        place, count = _part(shared is not None, near)

        def decode(index: int) -> None:
            self[index].copy_(to_bytes(read(samples[index][0])))

        def work() -> None:
            with ThreadPoolExecutor(-(-(os.cpu_count() or 1) // count) + 1) as pool:
                for _ in pool.map(decode, range(place, len(samples), count)):
                    pass

        _together(work, near)

    def __getitem__(self, index: int) -> Tensor:
        """Return (height, width, 3) bytes, a view."""
        height, width = map(int, self.sizes[index])
        end = int(self.ends[index])
        return self.bytes[end - 3 * height * width : end].view(height, width, 3)


def _sizes(samples: Sequence[Sample], near: Near) -> Any:
    """Return heights and widths, (N, 2); each rank looks at some of the files."""
    count = len(near.gather(None))
    own = [image_size(samples[index][0]) for index in range(near.number, len(samples), count)]
    sizes = np.zeros((len(samples), 2), np.int64)
    for number, part in enumerate(near.gather(own)):
        if part:
            sizes[number::count] = part
    return sizes


def _check(need: int, num: int, free: int | None, near: Near) -> None:
    """Refuse images that need too much memory, on every rank if on one."""

    def compare() -> None:
        room = free_bytes() if free is None else free
        if need > 0.8 * room:
            raise UserError(
                f"--cache ram needs {need / 2**30:.1f} GiB for {num} decoded images, but only {room / 2**30:.1f} "
                "GiB of memory are free: make smaller copies of the images with mgd prepare, or use --cache off"
            )

    _together(compare, near)


def _together(work: Callable[[], None], near: Near) -> None:
    """Do this rank's work; an error on one is raised on all, which would wait for it otherwise."""
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
    """Return memory that this rank and its loading processes share."""
    try:
        block: Tensor = torch.empty(need, dtype=torch.uint8).share_memory_()
        return block
    except RuntimeError as error:
        raise _no_room(need) from error


def _shared(need: int, near: Near) -> Tensor | None:
    """Return memory that the ranks of a machine share, or None on one that does not see it.

    It is a file without a name once all have opened it: it goes when the last of them ends, however that is.
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
        near.gather(None)  # all have it now
        return block
    finally:
        if made:
            file.unlink(missing_ok=True)


def _reserve(file: Path, need: int) -> None:
    """Make a file that has its memory: without it, writing would end the process where there is too little."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, need)
    finally:
        os.close(descriptor)


def _part(shares: bool, near: Near) -> tuple[int, int]:
    """Return which of how many equal parts this rank decodes."""
    sharing = [number for number, own in enumerate(near.gather(shares)) if own]
    return (sharing.index(near.number), len(sharing)) if shares else (0, 1)
