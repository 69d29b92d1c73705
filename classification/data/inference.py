"""Images to predict: find the files that a user's paths mean, and read them in batches."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from classification.data.image_files import SUFFIXES, LeftOut, find_images, is_image
from classification.data.images import read_image_or_cause, to_bytes
from classification.data.lists import LONGEST_LINE
from classification.data.loading import explain_worker_errors
from classification.data.members import image_exists
from classification.data.preprocessing import Preprocessing, Transform
from classification.data.tar_shards import SUFFIX, is_shard, shard_images
from classification.errors import UserError, quoted
from classification.paths import exists, is_file, is_folder
from classification.system.interrupt import outlast

STDIN = "-"


@dataclass(frozen=True)
class ImagePaths:
    """The images to predict.

    Args:
        paths: of the images, in the order in which they were typed; the images of a folder are sorted.
        notes: what was left out, one line each.
    """

    paths: list[str]
    notes: list[str] = field(default_factory=list)


def find_paths(words: Iterable[str], stdin: BinaryIO) -> ImagePaths:
    """Return the images that the user's words name.

    A word is one of: an image; a tar shard; a folder, with images and shards at any depth; a list with one path per
    line, relative to the current folder; `-` for a list on stdin. A file is an image if its name or its content says
    so, and a list otherwise.

    Args:
        words: what the user typed.
        stdin: read for the word `-`.

    Raises:
        UserError: a path does not exist, a file is neither an image nor a list, or there are no images.
    """
    paths: list[str] = []
    left_out = LeftOut()
    words = list(words)
    shard_paths = shard_images(word for word in words if word != STDIN and is_shard(word))
    for word in words:
        if word == STDIN:
            paths += _read_list(stdin, "stdin")
        elif is_folder(word):
            paths += _list_folder(Path(word), left_out)
        elif word in shard_paths:
            paths += shard_paths[word]
        elif is_image(word) or (is_file(word) and _looks_like_image(word)):
            if not image_exists(word):
                raise UserError(f"image {word} does not exist")
            paths.append(word)
        elif exists(word):
            paths += _read_list_file(word)
        else:
            raise UserError(f"{word} does not exist: give images, folders, lists of paths, or - for a list on stdin")
    if not paths:
        contents_note = f" ({contents})" if (contents := left_out.contents()) else ""
        names = ", ".join(words[:3]) + (" ..." if len(words) > 3 else "")
        raise UserError(f"no image found in {names}{contents_note}: images end in {' '.join(SUFFIXES)}")
    return ImagePaths(paths, left_out.notes())


def _list_folder(folder: Path, left_out: LeftOut) -> list[str]:
    """Return the images of a folder, then those of its tar shards."""
    listed = list(find_images(folder, left_out))
    paths = [os.path.join(top, name) for top, names in listed for name in names]  # noqa: PTH118
    if left_out.others[SUFFIX]:
        shards = [path for top, _ in listed for path in sorted(Path(top).glob(f"*{SUFFIX}")) if is_shard(path)]
        left_out.others -= Counter({SUFFIX: len(shards)})  # NAME.TAR is not a shard, and stays left out
        paths += [path for images in shard_images(shards).values() for path in images]
    return paths


def _looks_like_image(path: str) -> bool:
    try:
        with Image.open(path):
            return True
    except Exception:  # a broken file may raise anything
        return False


def _read_list_file(path: str) -> list[str]:
    try:
        with Path(path).open("rb") as file:
            paths = _read_list(file, path)
    except OSError as error:
        raise UserError(f"list {path} cannot be read: {error.strerror}") from error
    if paths and not any(map(image_exists, paths)):
        raise UserError(
            f"{path} is neither an image nor a list of images: its first line, {quoted(paths[0])}, is not the path of "
            "a file"
        )
    return paths


def _read_list(file: BinaryIO, name: str) -> list[str]:
    """Return the lines that are not empty; bytes that are not UTF-8 are kept, as in file names."""
    paths, number = [], 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if b"\0" in line or len(line) == LONGEST_LINE:
            raise UserError(f"{name} is neither an image nor a list of images: line {number} is not a path")
        if path := line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").rstrip(b"\r\n"):
            paths.append(os.fsdecode(path))
    return paths


@dataclass(frozen=True)
class PixelBatch:
    """A batch of images.

    Args:
        paths: of the images that could be read.
        pixels: bytes (B, H, W, 3) of these, in the same order.
        unreadable: (path, cause) of the others.
    """

    paths: list[str]
    pixels: Tensor
    unreadable: list[tuple[str, str]]


class _InferenceImages(Dataset[tuple[str, Tensor | str]]):
    """(path, preprocessed bytes) of every image; (path, cause) if it cannot be read."""

    def __init__(self, paths: Sequence[str], transform: Transform) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor | str]:
        path = self.paths[index]
        image = read_image_or_cause(path)
        if isinstance(image, str):
            return path, image
        return path, self.transform(to_bytes(image).permute(2, 0, 1)).permute(1, 2, 0).contiguous()


def _collate(samples: list[tuple[str, Tensor | str]]) -> PixelBatch:
    readable = [(path, pixels) for path, pixels in samples if isinstance(pixels, Tensor)]
    causes = [(path, cause) for path, cause in samples if isinstance(cause, str)]
    pixels = torch.stack([pixels for _, pixels in readable]) if readable else torch.empty(0, dtype=torch.uint8)
    return PixelBatch([path for path, _ in readable], pixels, causes)


def read_batches(
    paths: Sequence[str], preprocessing: Preprocessing, size: int, workers: int = 0
) -> Iterator[PixelBatch]:
    """Read images as evaluation does; each batch lists those that cannot be read.

    Args:
        paths: of the images.
        preprocessing: of the network.
        size: images per batch.
        workers: number of loading processes at most; 0 to load in this process.

    Raises:
        RunError: a loading process died.
    """
    workers = min(workers, (len(paths) - 1) // size)  # to start a process takes longer than to read one batch
    is_ending = multiprocessing.RawValue("b", 0)
    loading = DataLoader(
        _InferenceImages(paths, preprocessing.transform()),
        size,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=partial(outlast, ending=is_ending),
        generator=torch.Generator(),
    )
    try:
        yield from explain_worker_errors(loading, workers)
    finally:
        is_ending.value = 1
