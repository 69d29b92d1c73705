"""Lists of the images that were chosen: `path label score` per line, and beside it what they come from."""

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

Lists = Iterable[tuple[int, list[Chosen]]]  # of every class, its images


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Args:
        ranking: the images of every class.
        copies: images that were left out, and the picture that each is a copy of.
    """

    ranking: Ranking
    copies: dict[str, str]

    def sizes(self) -> dict[int, int]:
        """Return {class: images}."""
        return {label: len(paths) for label, paths, _ in self.ranking.parts}

    def lists(self, *, balance: bool = False) -> Iterator[tuple[int, list[Chosen]]]:
        """Yield every class and its images, best first.

        Args:
            balance: repeat the images of smaller classes in turn until every class has as many as the largest.
        """
        most = max(self.sizes().values())
        for label, images in self.ranking.lists():
            yield label, list(islice(cycle(images), most)) if balance else images


def select(shards: Shards, rule: Rule, copies: NearCopies | None = None) -> Selection:
    """Choose the K best images per class that are not near copies of others.

    Only images that would be chosen are compared. Where some are copies, the next ones take their places.

    Args:
        shards: the scores.
        rule: what is chosen.
        copies: the pictures to have no copies of, or None.

    Raises:
        UserError: nothing was chosen.
    """
    left_out: dict[str, str] = {}
    looked_at: set[str] = set()
    while True:
        ranking = rank(shards.files, rule, map(path_hash, left_out))
        if copies is None:
            break
        new = {image.path for _, images in ranking.lists() for image in images} - looked_at
        looked_at |= new
        found = copies.of(sorted(new))
        left_out |= found
        if not found:
            break
    _check(ranking, shards)
    return Selection(ranking, left_out)


def _check(ranking: Ranking, shards: Shards) -> None:
    classes = ranking.classes()
    if not classes:
        raise UserError("no image was chosen: lower --min-score, or look at the scores")
    if shards.num_classes is not None and classes[-1] >= shards.num_classes:
        raise UserError(
            f"the shards contain class {classes[-1]}, but their teacher has {shards.num_classes} classes: score again"
        )


def lines(lists: Lists, root: Path | None = None) -> Iterator[bytes]:
    """Yield `path label score`; the score is a log-probability.

    Args:
        lists: what was chosen.
        root: the folder to which paths are made relative; None for paths as they were scored.

    Raises:
        UserError: an image lies elsewhere.
    """
    for label, images in lists:
        for image in images:
            yield os.fsencode(f"{_seen_from(image.path, root)} {label} {written(image.score)}\n")


def written(score: float) -> str:
    """Write a float32 so that reading gives the same number; never as a whole number, which would look like a label."""
    text = f"{score:.9g}"
    return text if set(text) & set(".ein") else f"{text}.0"


def _seen_from(path: str, root: Path | None) -> str:
    if root is None:
        return path
    inner = os.path.relpath(os.path.abspath(path), os.path.abspath(root))  # noqa: PTH100  links stay what they are
    if Path(inner).parts[:1] == (os.pardir,):
        raise UserError(f"{path} does not lie in --root {root}: give the folder that holds all images")
    return inner


def about(shards: Shards, rule: Rule, selection: Selection, root: Path | None) -> bytes:
    """Return the file beside a list: teacher, classes and rule."""
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
