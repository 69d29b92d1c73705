"""List the images of tar shards in the WebDataset layout: NAME.jpg, and NAME.cls with its class index.

Only the headers are read, one after the other, and nothing is unpacked to disk. A shard that is truncated, or contains
anything but plain files, is an error that names it.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from classification.data.image_files import SUFFIXES, hidden, is_image
from classification.data.members import BLOCK, LARGEST, MARK, Member
from classification.errors import UserError, quoted
from classification.paths import is_file

SUFFIX = ".tar"
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # first bytes of compressed files
THREADS = 8  # number of shards whose headers are read at the same time
LONGEST_NAME = 1 << 16  # bytes of an extra header with a long name
CLASS = re.compile(rb"\s*([0-9]{1,9})\s*")
RECORD = re.compile(rb"([0-9]{1,5}) ([^=]+)=")
KINDS = {
    tarfile.LNKTYPE: "a link",
    tarfile.SYMTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a file with holes",
}
LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
Result = TypeVar("Result")
Found = tuple[Member, bytes]  # a file, and its first 512 bytes
Labelled = tuple[Member, Found | None]  # an image, and the file with its class index


def is_shard(path: str | Path) -> bool:
    """Return whether a file is a tar shard by its name.

    Raises:
        UserError: the file is a compressed tar file.
    """
    name = Path(path).name
    if name.lower().endswith(PACKED) and is_file(path):
        raise UserError(f"shard {path} is compressed, and images can be read only from plain shards: unpack it")
    return name.endswith(SUFFIX) and not hidden(name) and is_file(path)


def find_shards(folder: Path) -> list[Path]:
    """Return the shards in a folder, sorted by name; none if the folder has subfolders."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # the caller lists the folder too, and reports the error
        return []
    if any(entry.is_dir() and not hidden(entry.name) for entry in entries):
        return []
    return [entry for entry in entries if is_shard(entry)]


def shard_images(shards: Iterable[str | Path]) -> dict[str, list[str]]:
    """Return {shard: paths of its images in order}.

    Raises:
        UserError: a shard is truncated, or contains anything but plain files.
    """
    names = [str(shard) for shard in shards]
    return dict(zip(names, _side_by_side(_images, names), strict=True))


def _images(shard: str) -> list[str]:
    return [image.path for group in _samples(shard) for image, _ in group]


def _side_by_side(work: Callable[[str], Result], shards: Sequence[str]) -> list[Result]:
    """Apply `work` to several shards at the same time: on a network disk, each header takes long."""
    with ThreadPoolExecutor(max(1, min(THREADS, len(shards)))) as pool:
        return list(pool.map(work, shards))


def read_shards(shards: Sequence[Path], num_classes: int | None, *, labels: bool = True) -> list[tuple[str, int]]:
    """Return (path, class index or -1) of every image of the shards, in order.

    Args:
        shards: the files.
        num_classes: K, which every label must be below, or None if it is not known.
        labels: whether to read class indices.

    Raises:
        UserError: a shard is truncated, or contains anything but plain files; an image has no class index; there are
            no images.
    """
    if labels:
        parts = _side_by_side(partial(_labelled, num_classes=num_classes), [str(shard) for shard in shards])
        found = [sample for part in parts for sample in part]
    else:
        found = [(path, -1) for paths in shard_images(shards).values() for path in paths]
    if not found:
        raise UserError(f"{shards[0].parent} holds shards without images: expected NAME.jpg and NAME.cls in each")
    return found


def _labelled(shard: str, num_classes: int | None) -> list[tuple[str, int]]:
    found = []
    for group in _samples(shard):
        if len(group) > 1:
            names = " and ".join(quoted(image.name) for image, _ in group[:2])
            raise UserError(f"shard {shard}: {names} have one label: give each image a name of its own")
        found += [(image.path, _label(image, file, num_classes)) for image, file in group]
    return found


def _label(image: Member, file: Found | None, num_classes: int | None) -> int:
    if file is None:
        name = image.name.rpartition("/")[2].partition(".")[0]
        raise UserError(
            f"shard {image.shard}: {quoted(image.name)} has no label: expected {name}.cls beside it, or terms that "
            "need no labels"
        )
    label, content = file
    found = CLASS.fullmatch(content) if label.size == len(content) else None
    if not found:
        got = quoted(content) if label.size == len(content) else f"{label.size} bytes"
        raise UserError(f"shard {label.shard}: {quoted(label.name)} must hold a class index, as 3; got {got}")
    if num_classes is not None and int(found[1]) >= num_classes:
        raise UserError(
            f"shard {label.shard}: label {int(found[1])} of {quoted(label.name)} must be below the number of classes, "
            f"{num_classes}"
        )
    return int(found[1])


def _samples(shard: str) -> Iterator[list[Labelled]]:
    """Yield the labelled images of each group: consecutive files with the same name up to its first point.

    If a group has images with a simple suffix, only these count: a mask NAME.seg.png is not an image.
    """
    for _, files in groupby(_members(shard), lambda found: _parts(found[0].name)[:2]):
        group = [found for found in files if not any(map(hidden, found[0].name.split("/")))]
        images = [member for member, _ in group if is_image(member.name)]
        plain = [member for member in images if f".{_parts(member.name)[2]}" in SUFFIXES]
        label = next((found for found in group if _parts(found[0].name)[2] == "cls"), None)
        if images:
            yield [(image, label) for image in plain or images]


def _parts(name: str) -> tuple[str, str, str]:
    """Return the folder, the name up to its first point, and the rest of the name in lower case."""
    folder, _, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return folder, stem, kind.lower()


def _members(shard: str) -> Iterator[Found]:
    """Yield the plain files of a shard in order, each with its first 512 bytes; folders are left out.

    Raises:
        UserError: the shard cannot be read, or is compressed, truncated or no tar file; or it contains a link, a
            device, or a name that could lead to another folder.
    """
    try:
        with Path(shard).open("rb", buffering=0) as file:
            yield from _walk(shard, file.fileno(), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise UserError(f"shard {shard} cannot be read: {error.strerror}") from error


def _walk(shard: str, file: int, end: int) -> Iterator[Found]:
    place, before = 0, ""
    said: dict[str, str] = {}  # path and size from extra headers, for the next file
    while True:
        block = os.pread(file, 2 * BLOCK, place)
        header = _quick(block) or _header(shard, block[:BLOCK], place, before)
        if header is None:
            _check_end(shard, file, place)
            return
        start = place + BLOCK
        size = int(said.get("size", header.size))
        if size < 0:
            raise UserError(f"shard {shard} is damaged after {quoted(before)}, at byte {place}: copy it again")
        place = start if header.isdir() else start + -(-size // BLOCK) * BLOCK
        if header.type in LONG:
            if size > LONGEST_NAME:
                raise UserError(f"shard {shard} has a header of {size} bytes, too many for a name: pack it again")
            said |= _said(shard, header.type, os.pread(file, size, start))
            continue
        name = said.get("path", header.name)
        said = {}
        _check_member(shard, header.type, name, size)
        if header.isdir():
            continue
        if start + size > end:
            beyond = start + size - end
            raise UserError(
                f"shard {shard} is truncated: {quoted(name)} ends {beyond} bytes after the end of the file: copy it "
                "again"
            )
        before = name
        yield Member(shard, start, size, name.removeprefix("./")), block[BLOCK : BLOCK + size]


def _quick(block: bytes) -> tarfile.TarInfo | None:
    """Read the header of a plain file with a short name; None for others, and for broken headers.

    Most headers are of this kind, and it takes a quarter of the time of `TarInfo.frombuf`.
    """
    if block[156:157] != tarfile.REGTYPE or any(block[345:500]):
        return None
    try:
        size, total = int(block[124:136].rstrip(b" \0"), 8), int(block[148:156].rstrip(b" \0"), 8)
    except ValueError:
        return None
    if total != sum(block[:148]) + sum(block[156:BLOCK]) + 8 * ord(" "):  # the checksum field itself counts as spaces
        return None
    header = tarfile.TarInfo(block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape"))
    header.size = size
    return header


def _header(shard: str, block: bytes, place: int, before: str) -> tarfile.TarInfo | None:
    """Return the header at a position, None at the end mark of the archive."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if not place and (not block or any(block)):
            what = "is empty" if not block else "is compressed" if block.startswith(MAGIC) else "is no tar file"
            raise UserError(f"shard {shard} {what}: expected a tar file as `tar -cf` makes it") from error
        if len(block) < BLOCK:
            raise UserError(
                f"shard {shard} is truncated: it has no end mark after {quoted(before)}: copy it again"
            ) from error
        if any(block):
            raise UserError(
                f"shard {shard} is damaged after {quoted(before)}, at byte {place}: copy it again"
            ) from error
        return None


def _check_end(shard: str, file: int, place: int) -> None:
    """Refuse a shard with more files after the end mark (two archives joined), as other programs would ignore them."""
    while block := os.pread(file, 1 << 20, place):
        if block.strip(b"\0"):
            raise UserError(
                f"shard {shard} contains more after its end mark: keep archives in separate files, or pack them again"
            )
        place += len(block)


def _check_member(shard: str, kind: bytes, name: str, size: int) -> None:
    if kind not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE):
        raise UserError(
            f"shard {shard}: {quoted(name)} is {KINDS.get(kind, 'of an unknown kind')}: pack plain files only"
        )
    if name.startswith("/") or ".." in name.split("/") or "\0" in name or MARK in name:
        raise UserError(
            f"shard {shard}: the name {quoted(name)} could lead out of the folder: pack it again with plain names"
        )
    if size > LARGEST and is_image(name):
        raise UserError(f"shard {shard}: {quoted(name)} has {size} bytes, more than the {LARGEST} of an image")


def _said(shard: str, kind: bytes, content: bytes) -> dict[str, str]:
    """Return the path and size of the next file from an extra header, as far as it has them."""
    if kind == tarfile.GNUTYPE_LONGLINK:
        return {}
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": os.fsdecode(content.rstrip(b"\0"))}
    said: dict[str, str] = {}
    place = 0
    while found := RECORD.match(content, place):
        end = place + int(found[1])
        key, value = found[2].decode("utf-8", "replace"), os.fsdecode(content[found.end() : end - 1])
        wrong = key == "size" and not (value.isdecimal() and len(value) < 20)
        if end <= found.end() or wrong or key.startswith("GNU.sparse"):  # a file with holes
            break
        if kind == tarfile.XHDTYPE and key in ("path", "size"):
            said[key] = value
        place = end
    if content[place:].strip(b"\0"):
        raise UserError(f"shard {shard} has a header that cannot be read: pack it again, as by `tar -cf`")
    return said
