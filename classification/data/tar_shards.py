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

from classification.data.image_files import SUFFIXES, is_hidden, is_image
from classification.data.members import BLOCK, MARK, MAX_MEMBER_SIZE, Member
from classification.errors import UserError, quoted
from classification.paths import is_file

SUFFIX = ".tar"
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # first bytes of compressed files
THREADS = 8  # number of shards whose headers are read at the same time
LONGEST_NAME = 1 << 16  # bytes of an extra header with a long name
CLASS_INDEX = re.compile(rb"\s*([0-9]{1,9})\s*")
PAX_RECORD = re.compile(rb"([0-9]{1,5}) ([^=]+)=")
UNSUPPORTED = {
    tarfile.LNKTYPE: "a link",
    tarfile.SYMTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a file with holes",
}
EXTRA_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
Result = TypeVar("Result")
FileStart = tuple[Member, bytes]  # a file, and its first 512 bytes
LabelledImage = tuple[Member, FileStart | None]  # an image, and the file with its class index


def is_shard(path: str | Path) -> bool:
    """Return whether a file is a tar shard by its name.

    Raises:
        UserError: the file is a compressed tar file.
    """
    name = Path(path).name
    if name.lower().endswith(COMPRESSED_SUFFIXES) and is_file(path):
        raise UserError(f"shard {path} is compressed, and images can be read only from plain shards: unpack it")
    return name.endswith(SUFFIX) and not is_hidden(name) and is_file(path)


def find_shards(folder: Path) -> list[Path]:
    """Return the shards in a folder, sorted by name; none if the folder has subfolders."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # the caller lists the folder too, and reports the error
        return []
    if any(entry.is_dir() and not is_hidden(entry.name) for entry in entries):
        return []
    return [entry for entry in entries if is_shard(entry)]


def shard_images(shards: Iterable[str | Path]) -> dict[str, list[str]]:
    """Return {shard: paths of its images in order}.

    Raises:
        UserError: a shard is truncated, or contains anything but plain files.
    """
    names = [str(shard) for shard in shards]
    return dict(zip(names, _in_parallel(_images, names), strict=True))


def _images(shard: str) -> list[str]:
    return [image.path for group in _groups(shard) for image, _ in group]


def _in_parallel(work: Callable[[str], Result], shards: Sequence[str]) -> list[Result]:
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
        parts = _in_parallel(partial(_labelled, num_classes=num_classes), [str(shard) for shard in shards])
        samples = [sample for part in parts for sample in part]
    else:
        samples = [(path, -1) for paths in shard_images(shards).values() for path in paths]
    if not samples:
        raise UserError(f"{shards[0].parent} holds shards without images: expected NAME.jpg and NAME.cls in each")
    return samples


def _labelled(shard: str, num_classes: int | None) -> list[tuple[str, int]]:
    samples = []
    for group in _groups(shard):
        if len(group) > 1:
            names = " and ".join(quoted(image.name) for image, _ in group[:2])
            raise UserError(f"shard {shard}: {names} have one label: give each image a name of its own")
        samples += [(image.path, _label(image, file, num_classes)) for image, file in group]
    return samples


def _label(image: Member, file: FileStart | None, num_classes: int | None) -> int:
    if file is None:
        name = image.name.rpartition("/")[2].partition(".")[0]
        raise UserError(
            f"shard {image.shard}: {quoted(image.name)} has no label: expected {name}.cls beside it, or terms that "
            "need no labels"
        )
    label, content = file
    match = CLASS_INDEX.fullmatch(content) if label.size == len(content) else None
    if not match:
        got = quoted(content) if label.size == len(content) else f"{label.size} bytes"
        raise UserError(f"shard {label.shard}: {quoted(label.name)} must hold a class index, as 3; got {got}")
    if num_classes is not None and int(match[1]) >= num_classes:
        raise UserError(
            f"shard {label.shard}: label {int(match[1])} of {quoted(label.name)} must be below the number of classes, "
            f"{num_classes}"
        )
    return int(match[1])


def _groups(shard: str) -> Iterator[list[LabelledImage]]:
    """Yield the labelled images of each group: consecutive files with the same name up to its first point.

    If a group has images with a simple suffix, only these count: a mask NAME.seg.png is not an image.
    """
    for _, files in groupby(_members(shard), lambda file: _split_name(file[0].name)[:2]):
        group = [file for file in files if not any(map(is_hidden, file[0].name.split("/")))]
        images = [member for member, _ in group if is_image(member.name)]
        plain = [member for member in images if f".{_split_name(member.name)[2]}" in SUFFIXES]
        label = next((file for file in group if _split_name(file[0].name)[2] == "cls"), None)
        if images:
            yield [(image, label) for image in plain or images]


def _split_name(name: str) -> tuple[str, str, str]:
    """Return the folder, the name up to its first point, and the rest of the name in lower case."""
    folder, _, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return folder, stem, kind.lower()


def _members(shard: str) -> Iterator[FileStart]:
    """Yield the plain files of a shard in order, each with its first 512 bytes; folders are left out.

    Raises:
        UserError: the shard cannot be read, or is compressed, truncated or no tar file; or it contains a link, a
            device, or a name that could lead to another folder.
    """
    try:
        with Path(shard).open("rb", buffering=0) as file:
            yield from _read_headers(shard, file.fileno(), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise UserError(f"shard {shard} cannot be read: {error.strerror}") from error


def _read_headers(shard: str, file: int, end: int) -> Iterator[FileStart]:
    position, previous = 0, ""
    extra: dict[str, str] = {}  # path and size from extra headers, for the next file
    while True:
        block = os.pread(file, 2 * BLOCK, position)
        header = _read_plain_header(block) or _parse_header(shard, block[:BLOCK], position, previous)
        if header is None:
            _check_end(shard, file, position)
            return
        start = position + BLOCK
        size = int(extra.get("size", header.size))
        if size < 0:
            raise UserError(f"shard {shard} is damaged after {quoted(previous)}, at byte {position}: copy it again")
        position = start if header.isdir() else start + -(-size // BLOCK) * BLOCK
        if header.type in EXTRA_HEADERS:
            if size > LONGEST_NAME:
                raise UserError(f"shard {shard} has a header of {size} bytes, too many for a name: pack it again")
            extra |= _read_extra_header(shard, header.type, os.pread(file, size, start))
            continue
        name = extra.get("path", header.name)
        extra = {}
        _check_member(shard, header.type, name, size)
        if header.isdir():
            continue
        if start + size > end:
            beyond = start + size - end
            raise UserError(
                f"shard {shard} is truncated: {quoted(name)} ends {beyond} bytes after the end of the file: copy it "
                "again"
            )
        previous = name
        yield Member(shard, start, size, name.removeprefix("./")), block[BLOCK : BLOCK + size]


def _read_plain_header(block: bytes) -> tarfile.TarInfo | None:
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


def _parse_header(shard: str, block: bytes, position: int, previous: str) -> tarfile.TarInfo | None:
    """Return the header at a position, None at the end mark of the archive."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if not position and (not block or any(block)):
            compressed = block.startswith(COMPRESSED_MAGIC)
            what = "is empty" if not block else "is compressed" if compressed else "is no tar file"
            raise UserError(f"shard {shard} {what}: expected a tar file as `tar -cf` makes it") from error
        if len(block) < BLOCK:
            raise UserError(
                f"shard {shard} is truncated: it has no end mark after {quoted(previous)}: copy it again"
            ) from error
        if any(block):
            raise UserError(
                f"shard {shard} is damaged after {quoted(previous)}, at byte {position}: copy it again"
            ) from error
        return None


def _check_end(shard: str, file: int, position: int) -> None:
    """Refuse a shard with more files after the end mark (two archives joined), as other programs would ignore them."""
    while block := os.pread(file, 1 << 20, position):
        if block.strip(b"\0"):
            raise UserError(
                f"shard {shard} contains more after its end mark: keep archives in separate files, or pack them again"
            )
        position += len(block)


def _check_member(shard: str, kind: bytes, name: str, size: int) -> None:
    if kind not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE):
        raise UserError(
            f"shard {shard}: {quoted(name)} is {UNSUPPORTED.get(kind, 'of an unknown kind')}: pack plain files only"
        )
    if name.startswith("/") or ".." in name.split("/") or "\0" in name or MARK in name:
        raise UserError(
            f"shard {shard}: the name {quoted(name)} could lead out of the folder: pack it again with plain names"
        )
    if size > MAX_MEMBER_SIZE and is_image(name):
        raise UserError(f"shard {shard}: {quoted(name)} has {size} bytes, more than the {MAX_MEMBER_SIZE} of an image")


def _read_extra_header(shard: str, kind: bytes, content: bytes) -> dict[str, str]:
    """Return what an extra header says of the next file: its "path", its "size", both or neither."""
    if kind == tarfile.GNUTYPE_LONGLINK:
        return {}
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": os.fsdecode(content.rstrip(b"\0"))}
    values: dict[str, str] = {}
    position = 0
    while match := PAX_RECORD.match(content, position):
        end = position + int(match[1])
        key, value = match[2].decode("utf-8", "replace"), os.fsdecode(content[match.end() : end - 1])
        is_wrong = key == "size" and not (value.isdecimal() and len(value) < 20)
        if end <= match.end() or is_wrong or key.startswith("GNU.sparse"):  # a file with holes
            break
        if kind == tarfile.XHDTYPE and key in ("path", "size"):
            values[key] = value
        position = end
    if content[position:].strip(b"\0"):
        raise UserError(f"shard {shard} has a header that cannot be read: pack it again, as by `tar -cf`")
    return values
