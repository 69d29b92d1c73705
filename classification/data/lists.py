"""Lists of images in text files: `path label` per line, or `path label score` if a teacher labelled them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path

from classification.data.image_files import is_hidden
from classification.data.members import image_exists
from classification.errors import UserError, quoted

LABEL = re.compile(rb"[0-9]+")
SCORE = re.compile(rb"[-+]?(inf|[0-9]*\.[0-9]+(e[-+]?[0-9]+)?|[0-9]+e[-+]?[0-9]+|[0-9]+\.)")
LONGEST_LINE = 1 << 16  # bytes; a path is far shorter, and a file that is not a list may have no line ends at all


def read_list(
    path: str | Path, root: str | Path, num_classes: int | None = None, *, labels: bool = True
) -> list[tuple[str, int]]:
    """Read a list of images.

    A line has the path of an image relative to `root`, whitespace, and a class index. The path may contain spaces. A
    score may follow, a number with a point, an exponent or a sign; it is ignored here. Blank lines are skipped. Bytes
    that are not UTF-8 are kept, as in file names. Any suffix is allowed, but no hidden files. An absolute path must lie
    in `root`.

    Args:
        path: the list.
        root: the data folder.
        num_classes: K, which every label must be below, or None if it is not known.
        labels: whether to read class indices; without, they may be missing and are ignored.

    Returns:
        (path of the file, class index or -1) of every image, in the order of the list.

    Raises:
        UserError: the list is wrong; the message names list and line.
    """
    samples = []
    try:
        with Path(path).open("rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE):
                number += 1
                try:
                    if line.strip():
                        samples.append(_read_line(line, Path(root), num_classes, labels))
                except UserError as error:
                    raise UserError(f"list {path}, line {number}: {error}") from error
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "no file may have such a name"
        raise UserError(f"list {path} cannot be read: {cause}") from error
    if not samples:
        raise UserError(f"list {path} names no images: expected lines of `path label`")
    return samples


def _read_line(line: bytes, root: Path, num_classes: int | None, labels: bool) -> tuple[str, int]:
    if b"\0" in line:
        raise UserError("it contains a NUL byte: save the list as text in UTF-8")
    if len(line) == LONGEST_LINE:
        raise UserError("it is too long for a path and a label")
    if score_of(line) is not None:
        line = line[: line.rindex(line.split()[-1])]
    name, label = [b"", *line.rsplit(None, 1)][-2:]
    if not labels:
        labelled = LABEL.fullmatch(label) and image_exists(root / os.fsdecode(name))
        name, label = name if labelled else line.strip(), b"-1"
    elif not name or not LABEL.fullmatch(label):
        raise UserError(f"expected `path label` with a whole number as label; got {quoted(line.strip())}")
    limit = 10**9 if num_classes is None else num_classes
    if len(label) > 10 or int(label) >= limit:
        raise UserError(f"label {quoted(label)} must be below the number of classes, {limit}")
    path = Path(os.fsdecode(name))
    if path.is_relative_to(root.absolute()):
        path = path.relative_to(root.absolute())
    if path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"{quoted(name)} could lead out of the data folder: give a path relative to that folder, without .."
        )
    if hidden_parts := [part for part in path.parts if is_hidden(part)]:
        raise UserError(
            f"{quoted(name)} is a hidden file or one of the operating system ({quoted(hidden_parts[0])}): remove such "
            "lines"
        )
    if not image_exists(root / path):
        raise UserError(f"{quoted(name)} is not a file in {root}: paths of a list begin in that folder")
    return str(root / path), int(label)


def score_of(line: bytes) -> float | None:
    """Return the score at the end of a line, after a label; None if there is none."""
    parts = line.rsplit(None, 2)
    has_score = len(parts) == 3 and LABEL.fullmatch(parts[1]) and SCORE.fullmatch(parts[2])
    return float(parts[2]) if has_score else None


def numbered_classes(samples: list[tuple[str, int]], num_classes: int | None) -> list[str]:
    """Return "0", "1" ... as the names of the classes: `num_classes` of them, or as many as the labels need.

    Raises:
        UserError: `num_classes` is None, and a class below the largest label has no image.
    """
    labels = {label for _, label in samples}
    if num_classes is None and len(labels) <= max(labels):
        missing = next(label for label in range(len(labels) + 1) if label not in labels)
        raise UserError(
            f"the lists have no image of class {missing}, although their labels go up to {max(labels)}: if that is "
            "intended, give --num-classes"
        )
    return [str(index) for index in range(num_classes or len(labels))]


def read_pile(
    lists: Sequence[str], root: str | Path, classes: Sequence[str], *, labels: bool = True
) -> list[tuple[str, int]]:
    """Read lists of images that a teacher labelled, one after the other.

    Args:
        lists: the files.
        root: the folder of the images.
        classes: class names of the data, in order of index.
        labels: whether to read class indices.

    Returns:
        (path of the file, class index or -1) of every line.

    Raises:
        UserError: as in `read_list`, or the teacher has other classes.
    """
    for path in lists if labels else ():
        _check_teacher_classes(path, classes)
    return [sample for path in lists for sample in read_list(path, root, len(classes), labels=labels)]


def _check_teacher_classes(path: str, classes: Sequence[str]) -> None:
    """Compare the teacher's classes, in the file LIST.json if there is one, with those of the data."""
    try:
        description = json.loads(Path(f"{path}.json").read_bytes())
        teacher_classes = description.get("classes")
    except (OSError, ValueError, AttributeError):
        return
    if isinstance(teacher_classes, list) and teacher_classes != list(classes):
        pairs = zip([*teacher_classes, "none"], [*classes, "none"], strict=False)
        index, (teacher_class, class_name) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UserError(
            f"list {path} is from a teacher with other classes: its class {index} is {quoted(teacher_class)}, but "
            f"{quoted(class_name)} in the data: score with a teacher of the same classes"
        )


def join_pile(
    labelled: Sequence[tuple[str, int]], pile: list[tuple[str, int]], share: float | None
) -> list[tuple[str, int]]:
    """Join labelled images and a pile; the one that is too small for the share is repeated.

    Args:
        labelled: images with labels.
        pile: images that a teacher labelled.
        share: part of the result that is from the pile, 0 < share <= 1; None to take every image once.
    """
    if share is None:
        return [*labelled, *pile]
    if share == 1:
        return pile
    num_pile = round(len(labelled) * share / (1 - share))
    if num_pile >= len(pile):
        return [*labelled, *_repeat(pile, num_pile)]
    return _repeat(labelled, round(len(pile) * (1 - share) / share)) + pile


def _repeat(samples: Iterable[tuple[str, int]], number: int) -> list[tuple[str, int]]:
    return list(islice(cycle(samples), number))
