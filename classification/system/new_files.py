"""Files that a command writes for the user: complete or absent, and never over another one by accident."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from classification.errors import UserError
from classification.paths import exists, is_file, is_folder


def check_new(path: Path, *, force: bool = False, option: str = "--output", device: bool = True) -> None:
    """Refuse a file that could not be written, before any work is done.

    Args:
        path: the file.
        force: whether an existing file may be replaced.
        option: that names it, for the message.
        device: whether a device or pipe will do, as /dev/stdout; what `move` brings would take its place.

    Raises:
        UserError: there is such a file already, it is a folder or a device, or its folder is missing or closed.
    """
    if is_folder(path):
        raise UserError(f"{option} {path} is a folder: give a file in it")
    if exists(path) and not (device or is_file(path)):
        raise UserError(f"{option} {path} is a device or a pipe: give a file")
    if exists(path) and not force:
        raise UserError(f"{option} {path} exists already and is not overwritten: give another, or --force")
    if not is_folder(path.parent):
        raise UserError(f"{option} {path}: the folder {path.parent} does not exist: make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{option} {path}: the folder {path.parent} cannot be written to: give another")


@contextlib.contextmanager
def folder_beside(path: Path, option: str = "--output") -> Iterator[Path]:
    """Make a folder for files that `move` will bring to where `path` stands; it is removed in the end.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name[:100]}.", dir=path.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): make room, or give another {option}") from error


def write(path: Path, content: bytes) -> None:
    """Write a file and force it to disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def move(source: Path, target: Path) -> None:
    """Rename a file, and force the new name to disk.

    Raises:
        OSError: the target is no file, as a device, which root could replace; or the disk fails.
    """
    if exists(target) and not is_file(target):
        raise OSError(errno.EEXIST, "it is no file")
    source.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, content: bytes, option: str = "--output") -> None:
    """Write a file, over one of that name; a device or pipe, as /dev/stdout, is written to.

    Raises:
        UserError: the disk is full, or the folder cannot be written to; what was at `path` is still there.
    """
    if exists(path) and not is_file(path):
        try:
            with path.open("wb") as stream:
                stream.write(content)
        except BrokenPipeError:  # the reader has seen enough
            raise
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): give another {option}") from error
        return
    target = path.resolve()  # a link stays one
    with folder_beside(target, option) as folder:
        write(folder / target.name, content)
        move(folder / target.name, target)


def free_name(path: Path) -> Path:
    """Return `path`, or the first of path.2, path.3 ... that does not exist."""
    names = (path if number == 1 else path.with_name(f"{path.name}.{number}") for number in count(1))
    return next(name for name in names if not exists(name))
