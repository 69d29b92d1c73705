"""Remove metadata from image files that cannot be opened because their metadata is broken."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import BinaryIO

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
ADOBE = 0xEE  # APP14, the colour transform; at least 12 bytes
EXIF = 0xE1  # APP1, the orientation
SCAN = 0xDA  # start of the pixels
LENGTHLESS = {0x01, 0xFF, *range(0xD0, 0xD9)}  # markers without a length


def without_metadata(file: BinaryIO) -> bytes | None:
    """Return a PNG or JPEG file without its metadata, except the orientation; None for other formats.

    Everything else is kept as it is, even if it is broken.

    Source: PNG specification, third edition, section 5; ITU-T T.81, annex B.
    """
    head = file.read(len(PNG))
    if head == PNG:
        return PNG + b"".join(_png_chunks(file.read()))
    if head.startswith(JPEG):
        return b"".join(_jpeg_segments(head + file.read()))
    return None


def _png_chunks(data: bytes) -> Iterator[bytes]:
    """Yield the chunks to keep. A chunk is length, kind, content, checksum; lower-case kinds are optional."""
    position = 0
    while position < len(data):
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        chunk = data[position : position + 12 + length]
        intact = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind[:1].isupper() or kind == b"tRNS" or (kind == b"eXIf" and intact):
            yield chunk
        position += len(chunk)


def _jpeg_segments(data: bytes) -> Iterator[bytes]:
    """Yield the segments to keep, then the pixels and all that follows. A segment is FF, kind, length, content."""
    yield data[:2]
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != SCAN:
        kind = data[position + 1]
        length = 0 if kind in LENGTHLESS else int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position : position + 2 + length] if kind != 0xFF else data[position : position + 1]
        is_metadata = 0xE0 <= kind <= 0xEF or kind == 0xFE
        is_kept = (kind == EXIF and segment[4:8] == b"Exif") or (kind == ADOBE and len(segment) >= 16)
        if is_kept or not is_metadata:
            yield segment
        position += len(segment)
    yield data[position:]
