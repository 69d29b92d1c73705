"""Lists of images: one per line, `path label`; `path label score` where a teacher labelled them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path

from classification.data.image_files import hidden
from classification.data.members import is_there
from classification.errors import UserError, quoted

LABEL = re.compile(rb"[0-9]+")
SCORE = re.compile(rb"[-+]?(inf|[0-9]*\.[0-9]+(e[-+]?[0-9]+)?|[0-9]+e[-+]?[0-9]+|[0-9]+\.)")
LONGEST_LINE = 1 << 16  # bytes; a path is far shorter, a file that is no list may be one line without end


def read_list(
    path: str | Path, root: str | Path, num_classes: int | None = None, *, labels: bool = True
) -> list[tuple[str, int]]:
    """Read a list of images.

    A line is the image's path from `root` on, whitespace, and its class index; the path may hold spaces. A score may
    follow, a number with a point, an exponent or a sign, and counts for nothing. Blank lines are skipped, so lists can
    be joined. Bytes that are no text are kept, as in names of files. Without labels a class index may be missing, and
    counts for nothing. Any suffix is allowed; hidden files are refused. A path from / on must lie in `root`.

    Args:
        path: the list.
        root: the data folder.
        num_classes: K, where it is known: every label is below it.
        labels: whether class indices are wanted.

    Returns:
        (path of the file, class index or -1) of every image, in the order of the list.

    Raises:
        UserError: naming list and line.
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
        labelled = LABEL.fullmatch(label) and is_there(root / os.fsdecode(name))
        name, label = name if labelled else line.strip(), b"-1"
    elif not name or not LABEL.fullmatch(label):
        raise UserError(f"expected `path label` with a whole number as label; got {quoted(line.strip())}")
    most = 10**9 if num_classes is None else num_classes
    if len(label) > 10 or int(label) >= most:
        raise UserError(f"label {quoted(label)} must be below the number of classes, {most}")
    path = Path(os.fsdecode(name))
    if path.is_relative_to(root.absolute()):
        path = path.relative_to(root.absolute())
    if path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"{quoted(name)} could lead out of the data folder: give a path relative to that folder, without .."
        )
    if found := [part for part in path.parts if hidden(part)]:
        raise UserError(
            f"{quoted(name)} is a hidden file or one of the operating system ({quoted(found[0])}): remove such lines"
        )
    if not is_there(root / path):
        raise UserError(f"{quoted(name)} is not a file in {root}: paths of a list begin in that folder")
    return str(root / path), int(label)


def score_of(line: bytes) -> float | None:
    """Return the score at the end of a line, behind a label; None where there is none."""
    parts = line.rsplit(None, 2)
    scored = len(parts) == 3 and LABEL.fullmatch(parts[1]) and SCORE.fullmatch(parts[2])
    return float(parts[2]) if scored else None


def numbered_classes(samples: list[tuple[str, int]], num_classes: int | None) -> list[str]:
    """Name the classes of lists by their indices; without `num_classes` there are as many as the largest label says.

    Raises:
        UserError: the number is left to the labels, and they leave some class below the largest one out.
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
        root: the folder that holds their images.
        classes: names in order of index.
        labels: whether class indices are wanted.

    Returns:
        (path of the file, class index or -1) of every line.

    Raises:
        UserError: as in `read_list`, or the teacher has other classes.
    """
    for path in lists if labels else ():
        _check_teacher(path, classes)
    return [sample for path in lists for sample in read_list(path, root, len(classes), labels=labels)]


def _check_teacher(path: str, classes: Sequence[str]) -> None:
    """Compare the classes in the file beside a list, if there is one, with these."""
    try:
        about = json.loads(Path(f"{path}.json").read_bytes())
        theirs = about.get("classes")
    except (OSError, ValueError, AttributeError):
        return
    if isinstance(theirs, list) and theirs != list(classes):
        pairs = zip([*theirs, "none"], [*classes, "none"], strict=False)
        place, (their, own) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UserError(
            f"list {path} is from a teacher with other classes: its class {place} is {quoted(their)}, but "
            f"{quoted(own)} in the data: score with a teacher of the same classes"
        )


def mix(labelled: Sequence[tuple[str, int]], pile: list[tuple[str, int]], share: float | None) -> list[tuple[str, int]]:
    """Return both, of which the part `share` is the pile; the smaller one is repeated in turn to make it so.

    Args:
        labelled: images with labels.
        pile: images that a teacher labelled.
        share: 0 < share <= 1, or None for every image once.
    """
    if share is None:
        return [*labelled, *pile]
    if share == 1:
        return pile
    wanted = round(len(labelled) * share / (1 - share))  # of the pile
    if wanted >= len(pile):
        return [*labelled, *_repeated(pile, wanted)]
    return _repeated(labelled, round(len(pile) * (1 - share) / share)) + pile


def _repeated(samples: Iterable[tuple[str, int]], number: int) -> list[tuple[str, int]]:
    return list(islice(cycle(samples), number))
