"""Small copies of photographs, a list of their originals, and images that are in train and in another split."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from classification.data.image_files import count_of, identical_groups
from classification.data.images import read_image
from classification.data.split import TRAIN, Split
from classification.errors import UserError
from classification.paths import exists, is_folder

MAX_JPEG_SIDE = 65500  # px, the longest side that Pillow can encode
MANIFEST = "manifest.csv"
BLOCK = 1024  # images whose hashes are compared at once


@dataclass(frozen=True)
class Copy:
    """A photograph and its copy.

    Args:
        original: the file of the photograph.
        split: train, valid or test.
        class_name: name of the class.
        name: file name of the copy.
    """

    original: Path
    split: str
    class_name: str
    name: str

    @property
    def path(self) -> Path:
        """The path of the copy, relative to the new data folder."""
        return Path(self.split, self.class_name, self.name)


def name_copies(split: Split) -> list[Copy]:
    """Name the copy of every image.

    A number makes each name unique: two subfolders of a class, or two formats, may use the same name.
    """
    return [
        Copy(path, split_name, class_name, f"{path.stem[:60]}-{number}.jpg")
        for number, (path, (split_name, class_name)) in enumerate(split.placed.items())
    ]


def write_small_copy(path: Path, target: Path, side: int) -> None:
    """Write an upright copy whose short side is at most `side` px; the file appears only when it is complete.

    Raises:
        UserError: the image cannot be read, or is too long for a JPEG file.
    """
    image = read_image(str(path))
    scale = side / min(image.size)
    if scale < 1:
        width, height = (round(scale * length) for length in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)
    if max(image.size) > MAX_JPEG_SIDE:
        raise UserError(
            f"image {path} cannot be written: it has a side of {max(image.size)} px, which JPEG files cannot have"
        )
    temporary = target.with_name(f".{target.name}")
    image.save(temporary, format="JPEG", quality=95)
    temporary.replace(target)


def write_copies(copies: Sequence[Copy], top: Path, side: int) -> dict[Copy, str]:
    """Write the copies that do not exist yet; return those whose originals cannot be read, and why."""

    def attempt(copy: Copy) -> str:
        target = top / copy.path
        try:
            if not exists(target):
                write_small_copy(copy.original, target, side)
        except UserError as error:
            return str(error).partition(": repair or remove")[0]
        return ""

    for folder in {(top / copy.path).parent for copy in copies}:
        folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        causes = list(tqdm(pool.map(attempt, copies), total=len(copies), leave=False, disable=None, desc="copy"))
    return {copy: cause for copy, cause in zip(copies, causes, strict=True) if cause}


def open_partial_folder(folder: Path, copies: Sequence[Copy], side: int) -> Path:
    """Return a hidden folder beside `folder`, in which the copies are collected until all are written.

    What an interrupted command left there is kept if it would have copied the same unchanged files to the same paths at
    the same size. Otherwise it is removed.
    """
    digest = hashlib.sha256(str(side).encode())
    for copy in copies:
        state = copy.original.stat()
        digest.update(os.fsencode(f"{copy.original}\0{copy.path}\0{state.st_size}\0{state.st_mtime_ns}\n"))
    top = folder.with_name(f".{folder.name}.part")
    plan = top / "plan"
    if is_folder(top) and not (exists(plan) and plan.read_text() == digest.hexdigest()):
        shutil.rmtree(top)
    top.mkdir(parents=True, exist_ok=True)
    plan.write_text(digest.hexdigest())
    return top


def remove_empty_classes(copies: Sequence[Copy], failures: Mapping[Copy, str], top: Path) -> list[str]:
    """Remove class folders in which no image could be read; return a warning for each.

    Raises:
        UserError: a class of train has no images left.
    """
    filled = {(copy.split, copy.class_name) for copy in copies if copy not in failures}
    empty = sorted({(copy.split, copy.class_name) for copy in copies} - filled)
    if lost := [class_name for split, class_name in empty if split == TRAIN]:
        raise UserError(
            f"no image of {', '.join(lost[:5])} that was drawn for train can be read: repair or remove the broken ones"
        )
    for split, class_name in empty:
        (top / split / class_name).rmdir()
    return [f"warning: no image of {split}/{class_name} can be read" for split, class_name in empty]


def manifest_csv(copies: Sequence[Copy]) -> bytes:
    """Return a CSV file with the original of each copy; names that are not UTF-8 keep their bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["copy", "original", "split", "class"])
    for copy in copies:
        writer.writerow([copy.path, copy.original.resolve(), copy.split, copy.class_name])
    return os.fsencode(text.getvalue())


Pair = tuple[Copy, Copy]  # one of train, one of another split


def duplicate_pairs(copies: Sequence[Copy]) -> list[Pair]:
    """Return the copies in train whose originals equal one of another split byte for byte, each with that one."""
    by_path = {str(copy.original): copy for copy in copies}
    groups = identical_groups(by_path, lambda group: len({by_path[path].split for path in group}) > 1)
    return [pair for group in groups for pair in _pairs_of_group([by_path[path] for path in group])]


def _pairs_of_group(group: Sequence[Copy]) -> Iterator[Pair]:
    other = next((copy for copy in group if copy.split != TRAIN), None)
    for copy in group:
        if copy.split == TRAIN and other is not None:
            yield copy, other


def check_imagehash() -> None:
    """Check that the library that hashes images is installed.

    Raises:
        UserError: it is not; the message says what to install.
    """
    if importlib.util.find_spec("imagehash") is None:
        raise UserError("--near needs the library imagehash: `pip install ImageHash`, or leave --near out")


def similar_pairs(copies: Sequence[Copy], top: Path, bits: int) -> list[Pair]:
    """Return pairs (train, other split) whose perceptual hashes differ in at most `bits` of 64 bits."""
    in_train = [copy for copy in copies if copy.split == TRAIN]
    in_other = [copy for copy in copies if copy.split != TRAIN]
    train_hashes, other_hashes = (
        _perceptual_hashes([top / copy.path for copy in part]) for part in (in_train, in_other)
    )
    pairs = []
    for other_start in range(0, len(in_other), BLOCK):
        other = other_hashes[other_start : other_start + BLOCK]
        for train_start in range(0, len(in_train), BLOCK):
            train = train_hashes[train_start : train_start + BLOCK]
            # (train, other): the number of bits that differ.
            distances = len(train.T) - train @ other.T - (1 - train) @ (1 - other).T
            pairs += [
                (in_train[train_start + i], in_other[other_start + j])
                for i, j in zip(*np.nonzero(distances <= bits), strict=True)
            ]
    return pairs


def _perceptual_hashes(paths: Sequence[Path]) -> NDArray[np.float32]:
    """Return the perceptual hashes of images, (N, 64), each bit as 0 or 1."""
    import imagehash

    def hash_file(path: Path) -> NDArray[np.float32]:
        with Image.open(path) as image:
            return np.asarray(imagehash.phash(image).hash, dtype=np.float32).reshape(-1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = list(tqdm(pool.map(hash_file, paths), total=len(paths), leave=False, disable=None, desc="compare"))
    return np.stack(hashes) if hashes else np.zeros((0, 64), np.float32)


def settle_duplicates(
    pairs: Sequence[Pair], copies: list[Copy], top: Path, *, what: str, remove: bool
) -> tuple[list[Copy], list[str]]:
    """Remove from train the images that another split has too, or only report them; return the copies and the notes.

    Args:
        pairs: copies in train, each with its duplicate in another split.
        copies: all copies.
        top: the folder of the copies.
        what: how the duplicates in train are described.
        remove: whether they are removed.

    Raises:
        UserError: a class of train would have no images left.
    """
    if not pairs:
        return copies, []
    duplicates = {image for image, _ in pairs}
    image, duplicate = pairs[0]
    text = f"{count_of(len(duplicates), 'image')} of train {what}, for example {image.original} = {duplicate.original}"
    if not remove:
        return copies, [f"warning: {text}: --remove-duplicates leaves such images out of train"]
    remaining = [copy for copy in copies if copy not in duplicates]
    trained = {copy.class_name for copy in remaining if copy.split == TRAIN}
    if lost := sorted({copy.class_name for copy in duplicates} - trained):
        raise UserError(f"{text}: without them {', '.join(lost[:5])} has nothing to train on: add images")
    for copy in duplicates:
        (top / copy.path).unlink(missing_ok=True)
    return remaining, [f"left out {text}"]


def summarise(copies: Sequence[Copy], max_classes: int = 20) -> list[str]:
    """Return the lines of a table, images per class and split, and of the suffixes of the originals."""
    splits = list(dict.fromkeys(["train", "valid", *(copy.split for copy in copies)]))
    counts: dict[str, dict[str, int]] = {}
    suffixes: dict[str, int] = {}
    for copy in copies:
        counts_of_class = counts.setdefault(copy.class_name, dict.fromkeys(splits, 0))
        counts_of_class[copy.split] += 1
        suffix = copy.original.suffix.lower()
        suffixes[suffix] = suffixes.get(suffix, 0) + 1
    width = max(map(len, [*list(counts)[:max_classes], "class"]))
    lines = [" ".join([f"{'class':{width}}", *(f"{split:>7}" for split in splits)])]
    for class_name in sorted(counts)[:max_classes]:
        lines.append(" ".join([f"{class_name:{width}}", *(f"{counts[class_name][split]:>7}" for split in splits)]))
    if len(counts) > max_classes:
        sizes = sorted(counts_of_class["train"] for counts_of_class in counts.values())
        lines.append(
            f"and {len(counts) - max_classes} more classes; each class has {sizes[0]} to {sizes[-1]} images in train"
        )
    kinds = sorted(suffixes.items(), key=lambda item: -item[1])
    lines.append("made of " + ", ".join(f"{number} {suffix}" for suffix, number in kinds))
    for split in splits:
        classes = sum(bool(counts_of_class[split]) for counts_of_class in counts.values())
        lines.append(f"{split}: {sum(copy.split == split for copy in copies)} images of {classes} classes")
    return lines
