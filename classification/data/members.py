"""Open images by path, both plain files and files in tar shards.

SHARD.tar@START+SIZE/NAME is the path of the file NAME in a shard, SIZE bytes from byte START. So a process can read it
without listing the shard.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from classification.paths import is_file

MARK = ".tar@"
PATH_PATTERN = re.compile(r"(.+?\.tar)@([0-9]{1,15})\+([0-9]{1,15})/(.+)", re.DOTALL)
BLOCK = 512  # bytes of a tar header; files are padded to a multiple
MAX_MEMBER_SIZE = 1 << 30  # bytes; an image in a shard is read into memory at once


@dataclass(frozen=True)
class Member:
    """A file in a tar shard.

    Args:
        shard: path of the shard.
        start: first byte of the content.
        size: bytes.
        name: of the file in the shard.
    """

    shard: str
    start: int
    size: int
    name: str

    @property
    def path(self) -> str:
        """The path with which `open_image` opens it."""
        return f"{self.shard}@{self.start}+{self.size}/{self.name}"

    def read(self) -> bytes:
        """Return the content.

        Raises:
            OSError: the shard cannot be read.
            ValueError: the shard has something else at this position.
        """
        with open_without_blocking(self.shard) as file:
            self.check(file)
            content = file.read(self.size)
        if len(content) < self.size:
            raise ValueError("its shard ends in the middle of the image")
        return content

    def check(self, file: BinaryIO) -> None:
        """Check the header in front of the content, and leave the file at the first byte of the content.

        Raises:
            OSError: the shard cannot be read.
            ValueError: the header is that of another file.
        """
        try:
            file.seek(max(0, self.start - BLOCK))
            header = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError("its shard has no file at this place: perhaps it was packed again") from error
        in_header = len(self.name) < 100 and self.name.isascii()  # any other name is in an extra header before this one
        renamed = in_header and header.name.removeprefix("./") != self.name
        if renamed or not header.isreg() or header.size != self.size or self.size > MAX_MEMBER_SIZE:
            raise ValueError("its shard has another file at this place: perhaps it was packed again")


def parse_member(path: str) -> Member | None:
    """Return the file in a shard that a path names, or None for the path of a plain file."""
    match = PATH_PATTERN.fullmatch(path) if MARK in path else None
    return None if match is None else Member(match[1], int(match[2]), int(match[3]), match[4])


def open_without_blocking(path: str) -> BinaryIO:
    """Open a file without blocking, so that a named pipe reads as empty instead of hanging."""
    non_blocking = getattr(os, "O_NONBLOCK", 0)
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | non_blocking))


def open_image(path: str) -> BinaryIO:
    """Open a plain file, or a file in a shard.

    Raises:
        OSError: it cannot be read.
        ValueError: the shard has something else at this position.
    """
    member = parse_member(path)
    return open_without_blocking(path) if member is None else io.BytesIO(member.read())


def file_size(path: str) -> int:
    """Return the number of bytes of a plain file, or of a file in a shard.

    Raises:
        OSError: there is no such file.
    """
    member = parse_member(path)
    return Path(path).stat().st_size if member is None else member.size


def image_exists(path: str | Path) -> bool:
    """Return whether a plain file, or a file in a shard, exists."""
    member = parse_member(str(path))
    if member is None:
        return is_file(path)
    if not is_file(member.shard):
        return False
    try:
        with open_without_blocking(member.shard) as file:
            member.check(file)
    except (OSError, ValueError):
        return False
    return True
