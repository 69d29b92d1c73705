"""Choose the best images per class, and write lists of them, `path label score` per line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classification.errors import UserError
from classification.pile.ranking import Chosen, Ranking, Rule, rank
from classification.pile.shards import Shards, path_hash

if TYPE_CHECKING:
    from classification.pile.duplicates import NearCopies

Lists = Iterable[tuple[int, list[Chosen]]]  # (class, its images)


@dataclass(frozen=True)
class Selection:
    """The chosen images.

    Args:
        ranking: the chosen images of every class.
        copies: {path: original} of the near copies that were left out.
    """

    ranking: Ranking
    copies: dict[str, str]

    def sizes(self) -> dict[int, int]:
        """Return {class: number of images}."""
        return {label: len(paths) for label, paths, _ in self.ranking.parts}

    def lists(self, *, balance: bool = False) -> Iterator[tuple[int, list[Chosen]]]:
        """Yield (class, its images, best first).

        Args:
            balance: whether to repeat the images of smaller classes until all classes have equally many.
        """
        largest = max(self.sizes().values())
        for label, images in self.ranking.lists():
            yield label, list(islice(cycle(images), largest)) if balance else images


def select(shards: Shards, rule: Rule, copies: NearCopies | None = None) -> Selection:
    """Choose the K best images per class, without near copies of given originals.

    Only images that would be chosen are compared with the originals. Copies are replaced by the next best images.

    Args:
        shards: the scores.
        rule: which images to choose.
        copies: the originals, or None to allow copies.

    Raises:
        UserError: no image was chosen, or the scores are wrong.
    """
    left_out: dict[str, str] = {}
    compared: set[str] = set()
    while True:
        ranking = rank(shards.files, rule, map(path_hash, left_out))
        if copies is None:
            break
        new_paths = {image.path for _, images in ranking.lists() for image in images} - compared
        compared |= new_paths
        new_copies = copies.originals_of(sorted(new_paths))
        left_out |= new_copies
        if not new_copies:
            break
    _check_ranking(ranking, shards)
    return Selection(ranking, left_out)


def _check_ranking(ranking: Ranking, shards: Shards) -> None:
    classes = ranking.classes()
    if not classes:
        raise UserError("no image was chosen: lower --min-score, or look at the scores")
    if shards.num_classes is not None and classes[-1] >= shards.num_classes:
        raise UserError(
            f"the shards contain class {classes[-1]}, but their teacher has {shards.num_classes} classes: score again"
        )


def list_lines(lists: Lists, root: Path | None = None) -> Iterator[bytes]:
    """Yield the lines `path label score`; the score is a log-probability.

    Args:
        lists: the chosen images.
        root: write paths relative to this folder; None to write them as they were scored.

    Raises:
        UserError: an image is not in `root`.
    """
    for label, images in lists:
        for image in images:
            yield os.fsencode(f"{_relative_to(image.path, root)} {label} {format_score(image.score)}\n")


def format_score(score: float) -> str:
    """Write a float32 without loss, and never as an integer, because that would look like a label."""
    text = f"{score:.9g}"
    return text if set(text) & set(".ein") else f"{text}.0"


def _relative_to(path: str, root: Path | None) -> str:
    if root is None:
        return path
    inner = os.path.relpath(os.path.abspath(path), os.path.abspath(root))  # noqa: PTH100  does not resolve links
    if Path(inner).parts[:1] == (os.pardir,):
        raise UserError(f"{path} does not lie in --root {root}: give the folder that holds all images")
    return inner


def list_description(shards: Shards, rule: Rule, selection: Selection, root: Path | None) -> bytes:
    """Return the content of LIST.json: teacher, classes, rule and counts."""
    content: dict[str, Any] = {
        "format": 1,
        "teacher": shards.teacher,
        "num_classes": shards.num_classes,
        "classes": shards.classes,
        "root": None if root is None else os.path.abspath(root),  # noqa: PTH100
        "rule": {name: value for name, value in vars(rule).items() if value is not None and abs(value) < float("inf")},
        "images": {str(label): number for label, number in selection.sizes().items()},
        "near_copies": selection.copies,
    }
    return (json.dumps(content, indent=1) + "\n").encode()
