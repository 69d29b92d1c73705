"""Find the images in a folder by name, and files with equal bytes. Every command uses these rules."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path

from classification.data.members import file_size, open_image
from classification.errors import UserError

HEIF = (".heic", ".heif", ".hif")  # read by pillow-heif
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".gif", ".webp", ".avif"),
    *(".tif", ".tiff", ".bmp", ".dib", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpx", ".jpf"),
    *HEIF,
)
# Files and folders that operating systems and file servers leave among photographs; those with a dot are hidden anyway.
SYSTEM_NAMES = {
    *("@eadir", "__macosx", "__pycache__", "$recycle.bin", "recycler", "system volume information", "lost+found"),
    *("#recycle", "#snapshot", "@recycle", "@recently-snapshot", "network trash folder", "temporary items"),
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"),
}
BLOCK = 4096  # bytes; they differ between most files of equal size


def is_hidden(name: str) -> bool:
    """Return whether a name is hidden or belongs to the operating system; such files and folders are never data."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_image(name: str) -> bool:
    """Return whether a file name is that of an image."""
    return name.lower().endswith(SUFFIXES) and not is_hidden(name)


@dataclass
class LeftOut:
    """What was found in a folder beside the images that count.

    Args:
        others: files that are not images by their names, counted by suffix.
        hidden: paths of hidden folders, and of hidden files with an image suffix.
        loose: paths of images outside the class folders.
        folders: the folders that were listed; a new image would change one of them.
    """

    others: Counter[str] = field(default_factory=Counter)
    hidden: list[str] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    def add(self, other: LeftOut) -> None:
        """Add what was left out of another folder."""
        self.others += other.others
        self.hidden += other.hidden
        self.loose += other.loose
        self.folders += other.folders

    def kinds(self, num_suffixes: int = 6) -> str:
        """Return how many files are not images, by suffix: "9 .txt, 3 .mov"."""
        common = [f"{count} {suffix}" for suffix, count in self.others.most_common(num_suffixes)]
        rest = self.others.total() - sum(count for _, count in self.others.most_common(num_suffixes))
        return ", ".join([*common, *([f"{rest} others"] if rest else [])])

    def contents(self) -> str:
        """Return `kinds`, and the number of hidden files and folders."""
        return ", ".join(filter(None, [self.kinds(), f"{len(self.hidden)} hidden" if self.hidden else ""]))

    def notes(self) -> list[str]:
        """Return one line per kind of what was left out."""
        notes = []
        if self.others:
            notes.append(f"left out {count_of(self.others.total(), 'file')} not named like images: {self.kinds()}")
        if self.hidden:
            noun = "hidden file or folder" if len(self.hidden) == 1 else "hidden files and folders"
            notes.append(f"left out {len(self.hidden)} {noun}, for example {self.hidden[0]}")
        if self.loose:
            notes.append(
                f"left out {count_of(len(self.loose), 'image')} outside the class folders, for example {self.loose[0]}"
            )
        return notes


def count_of(count: int, noun: str) -> str:
    """Return "1 image", "2 images"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def class_names(split: Path, left_out: LeftOut) -> list[str]:
    """Return the names of the class folders of `split`, sorted.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        entries = sorted((entry.name, entry.is_dir()) for entry in os.scandir(split))
    except OSError as error:
        raise UserError(f"{split} cannot be read: {error.strerror}") from error
    left_out.folders.append(str(split))
    left_out.hidden += [str(split / name) for name, is_folder in entries if is_folder and is_hidden(name)]
    left_out.loose += [str(split / name) for name, is_folder in entries if not is_folder and is_image(name)]
    return [name for name, is_folder in entries if is_folder and not is_hidden(name)]


def find_images(top: Path, left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
    """Yield `top` and every folder below it, sorted, with the sorted names of its images.

    Links are followed. Other files are added to `left`.

    Raises:
        UserError: a folder cannot be read, or a link leads to a folder that it lies in.
    """
    return ((folder, sorted(_image_names(folder, names, left_out))) for folder, names in sorted(_walk(top, left_out)))


def _walk(top: Path, left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    for folder, subfolders, names in os.walk(top, followlinks=True, onerror=refuse):
        if Path(folder).is_symlink() and Path(folder).parent.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(
                f"{folder} is a link to a folder above it, so its images would be read again and again: remove the link"
            )
        left_out.folders.append(folder)
        left_out.hidden += [os.path.join(folder, name) for name in subfolders if is_hidden(name)]  # noqa: PTH118
        subfolders[:] = [name for name in subfolders if not is_hidden(name)]
        yield folder, names


def _image_names(folder: str, names: list[str], left_out: LeftOut) -> Iterator[str]:
    for name in names:
        if is_image(name):
            yield name
        elif not is_hidden(name):
            left_out.others[os.path.splitext(name)[1].lower()[:20] or "without a suffix"] += 1  # noqa: PTH122
        elif name.lower().endswith(SUFFIXES):
            left_out.hidden.append(os.path.join(folder, name))  # noqa: PTH118


def identical_groups(
    paths: Iterable[str], is_wanted: Callable[[list[str]], bool] = lambda group: len(group) > 1
) -> list[list[str]]:
    """Return groups of files with equal bytes.

    Only files of equal size are opened, and only those with an equal middle are read completely. Files that are empty
    or cannot be read are in no group.

    Args:
        paths: the files.
        is_wanted: whether a group is of interest; files of other groups are not read.
    """
    groups = [list(paths)]
    for key in (_size, partial(_hash_file, num_bytes=BLOCK), _hash_file):
        refined: list[list[str]] = []
        for group in groups:
            by_key: dict[object, list[str]] = {}
            for path in group:
                try:
                    by_key.setdefault(key(path), []).append(path)
                except (OSError, ValueError):
                    continue
            refined += [group for group in by_key.values() if is_wanted(group)]
        groups = refined
    return groups


def _size(path: str) -> int:
    if size := file_size(path):
        return size
    raise OSError("empty")


def _hash_file(path: str, num_bytes: int | None = None) -> bytes:
    """Hash a file, or only the `num_bytes` bytes in its middle."""
    with open_image(path) as file:
        if num_bytes is not None:
            file.seek(max(0, file_size(path) - num_bytes) // 2)
            return blake2b(file.read(num_bytes)).digest()
        state = blake2b()
        while part := file.read(1 << 20):
            state.update(part)
        return state.digest()


def file_digest(path: str) -> str:
    """Return a hash of a file: the first 32 hexadecimal digits of the 64-byte BLAKE2b of its bytes."""
    return _hash_file(path).hex()[:32]


def identical_pairs(one: Iterable[str], other: Iterable[str]) -> list[tuple[str, str]]:
    """Return (path of `one`, path of `other`) for each file of `other` that has the same bytes as a file of `one`."""
    first_paths, second_paths = set(one), set(other)

    def in_both(group: list[str]) -> bool:
        return not first_paths.isdisjoint(group) and not second_paths.isdisjoint(group)

    pairs = []
    for group in identical_groups(sorted(first_paths | second_paths), in_both):
        first = next(path for path in group if path in first_paths)
        pairs += [(first, path) for path in group if path in second_paths]
    return pairs
