"""Which files of a folder are images, and which are copies of each other: one rule for training, lists and scripts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path

from classification.data.members import open_image, size_of
from classification.errors import UserError

HEIF = (".heic", ".heif", ".hif")  # read by pillow-heif
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".gif", ".webp", ".avif"),
    *(".tif", ".tiff", ".bmp", ".dib", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpx", ".jpf"),
    *HEIF,
)
# What systems and file servers leave in folders of photographs, beside names that begin with a dot.
SYSTEM = {
    *("@eadir", "__macosx", "__pycache__", "$recycle.bin", "recycler", "system volume information", "lost+found"),
    *("#recycle", "#snapshot", "@recycle", "@recently-snapshot", "network trash folder", "temporary items"),
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"),
}
BLOCK = 4096  # bytes, which tell most files of equal size apart


def hidden(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or a system's own: it is never data."""
    return name.startswith(".") or name.lower() in SYSTEM


def is_image(name: str) -> bool:
    """Return whether a file is an image by its name."""
    return name.lower().endswith(SUFFIXES) and not hidden(name)


@dataclass
class LeftOut:
    """What was found beside images.

    Args:
        others: files that are not images by their names, counted by suffix.
        hidden: hidden folders, and hidden files that are called images.
        loose: images beside the class folders.
        read: the folders whose names were read, in which a new name may be a new image.
    """

    others: Counter[str] = field(default_factory=Counter)
    hidden: list[str] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)

    def add(self, other: LeftOut) -> None:
        """Add what was left out elsewhere."""
        self.others += other.others
        self.hidden += other.hidden
        self.loose += other.loose
        self.read += other.read

    def kinds(self, most: int = 6) -> str:
        """Return the files that are not images by suffix: "9 .txt, 3 .mov"."""
        common = [f"{count} {suffix}" for suffix, count in self.others.most_common(most)]
        rest = self.others.total() - sum(count for _, count in self.others.most_common(most))
        return ", ".join([*common, *([f"{rest} others"] if rest else [])])

    def contents(self) -> str:
        """Return `kinds`, and how much is hidden."""
        return ", ".join(filter(None, [self.kinds(), f"{len(self.hidden)} hidden" if self.hidden else ""]))

    def notes(self) -> list[str]:
        """Return one line per kind of what was left out."""
        found = []
        if self.others:
            found.append(f"left out {count_of(self.others.total(), 'file')} not named like images: {self.kinds()}")
        if self.hidden:
            what = "hidden file or folder" if len(self.hidden) == 1 else "hidden files and folders"
            found.append(f"left out {len(self.hidden)} {what}, for example {self.hidden[0]}")
        if self.loose:
            found.append(
                f"left out {count_of(len(self.loose), 'image')} outside the class folders, for example {self.loose[0]}"
            )
        return found


def count_of(count: int, noun: str) -> str:
    """Return "1 image", "2 images"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def class_names(split: Path, left: LeftOut) -> list[str]:
    """Return the names of the class folders of `split`, sorted.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        entries = sorted((entry.name, entry.is_dir()) for entry in os.scandir(split))
    except OSError as error:
        raise UserError(f"{split} cannot be read: {error.strerror}") from error
    left.read.append(str(split))
    left.hidden += [str(split / name) for name, is_folder in entries if is_folder and hidden(name)]
    left.loose += [str(split / name) for name, is_folder in entries if not is_folder and is_image(name)]
    return [name for name, is_folder in entries if is_folder and not hidden(name)]


def find_images(top: Path, left: LeftOut) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder from `top` on, sorted, and the names of its images, sorted; add the rest to `left`.

    Links are followed.

    Raises:
        UserError: a folder cannot be read, or a link leads to a folder that it lies in.
    """
    return ((folder, sorted(_images(folder, names, left))) for folder, names in sorted(_walk(top, left)))


def _walk(top: Path, left: LeftOut) -> Iterator[tuple[str, list[str]]]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    for folder, folders, names in os.walk(top, followlinks=True, onerror=refuse):
        if Path(folder).is_symlink() and Path(folder).parent.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(
                f"{folder} is a link to a folder above it, so its images would be read again and again: remove the link"
            )
        left.read.append(folder)
        left.hidden += [os.path.join(folder, name) for name in folders if hidden(name)]  # noqa: PTH118
        folders[:] = [name for name in folders if not hidden(name)]
        yield folder, names


def _images(folder: str, names: list[str], left: LeftOut) -> Iterator[str]:
    for name in names:
        if is_image(name):
            yield name
        elif not hidden(name):
            left.others[os.path.splitext(name)[1].lower()[:20] or "without a suffix"] += 1  # noqa: PTH122
        elif name.lower().endswith(SUFFIXES):
            left.hidden.append(os.path.join(folder, name))  # noqa: PTH118


def identical(
    paths: Iterable[str], wanted: Callable[[list[str]], bool] = lambda group: len(group) > 1
) -> list[list[str]]:
    """Return groups of files whose bytes are the same.

    Only files of equal size are opened, and only those whose middle is the same are read whole. Files that are empty
    or cannot be read are in no group.

    Args:
        paths: the files.
        wanted: which groups count; the others are not looked into.
    """
    groups = [list(paths)]
    for key in (_size, partial(_digest, most=BLOCK), _digest):
        finer: list[list[str]] = []
        for group in groups:
            parts: dict[object, list[str]] = {}
            for path in group:
                try:
                    parts.setdefault(key(path), []).append(path)
                except (OSError, ValueError):
                    continue
            finer += [part for part in parts.values() if wanted(part)]
        groups = finer
    return groups


def _size(path: str) -> int:
    if size := size_of(path):
        return size
    raise OSError("empty")


def _digest(path: str, most: int | None = None) -> bytes:
    """Hash a file, or the `most` bytes in its middle."""
    with open_image(path) as file:
        if most is not None:
            file.seek(max(0, size_of(path) - most) // 2)
            return blake2b(file.read(most)).digest()
        state = blake2b()
        while part := file.read(1 << 20):
            state.update(part)
        return state.digest()


def file_digest(path: str) -> str:
    """Return 32 hexadecimal digits of a file's bytes: the beginning of their BLAKE2b of 64 bytes."""
    return _digest(path).hex()[:32]


def across(one: Iterable[str], other: Iterable[str]) -> list[tuple[str, str]]:
    """Return (path of `one`, path of `other`) for each file of `other` whose bytes are those of a file of `one`."""
    first, second = set(one), set(other)

    def both(group: list[str]) -> bool:
        return not first.isdisjoint(group) and not second.isdisjoint(group)

    found = []
    for group in identical(sorted(first | second), both):
        source = next(path for path in group if path in first)
        found += [(source, path) for path in group if path in second]
    return found
