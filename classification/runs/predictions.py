"""What a network says of images, as files and as lines of a table."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from classification.errors import RunError, UserError, one_line

HEADER = ("path", "rank", "class", "probability")
WIDEST = 60  # characters of a column that are padded


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image.

    Args:
        path: of the image.
        class_ids: their indices, the likeliest first.
        scores: their probabilities.
    """

    path: str
    class_ids: list[int]
    scores: list[float]


def predictions(paths: Sequence[str], logits: Tensor, top: int) -> list[Prediction]:
    """Return the `top` likeliest classes of every image: softmax of the logits (B, K).

    Raises:
        RunError: logits are not finite.
    """
    if not logits.isfinite().all():
        bad = int((~logits.isfinite().all(1)).nonzero()[0])
        raise RunError(f"the network's outputs for {paths[bad]} are not finite: are its weights damaged?")
    scores, ids = logits.double().softmax(1).topk(top, dim=1)
    found = zip(paths, ids.tolist(), scores.tolist(), strict=True)
    return [Prediction(path, which, [float(f"{score:.6g}") for score in likely]) for path, which, likely in found]


def class_names(path: Path | None, known: Sequence[str] | None, num_classes: int) -> list[str]:
    """Return the names of the classes: lines of a file, or else those that are known, or else their indices.

    Args:
        path: of a file with one name per line.
        known: the checkpoint's.
        num_classes: how many there are.

    Raises:
        UserError: the file cannot be read, or has another number of lines.
    """
    if path is None:
        return list(known) if known is not None else [str(index) for index in range(num_classes)]
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "no file may have such a name"
        raise UserError(f"--class-names {path} cannot be read: {cause}") from error
    lines = [line.removesuffix(b"\r") for line in content.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").split(b"\n")]
    if len(lines) != num_classes or not content.strip():
        count = len(lines) if content.strip() else 0
        raise UserError(
            f"--class-names {path} has {count} lines, the checkpoint {num_classes} classes: give one name per line, in "
            "order of the class indices"
        )
    return [os.fsdecode(line) for line in lines]


def to_csv(found: Iterable[Prediction], names: Sequence[str]) -> bytes:
    """Return rows of `HEADER`, the rank counted from 1; bytes that are no text stay what they are."""
    text = io.StringIO(newline="")
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    plain.writerow(HEADER)
    for one in found:
        for rank, (index, score) in enumerate(zip(one.class_ids, one.scores, strict=True), 1):
            row = (one.path, rank, names[index], score)
            # Python before 3.13 writes a lone carriage return without quotes, which readers take for the end of a row.
            (quoted if "\r" in f"{one.path}{names[index]}" else plain).writerow(row)
    return text.getvalue().encode("utf-8", "surrogateescape")


def to_json(found: Iterable[Prediction], names: Sequence[str]) -> bytes:
    """Return a list of objects, one per image; in names, bytes that are no text are escaped as Python does."""
    entries = [
        {
            "class_ids": one.class_ids,
            "scores": one.scores,
            "file_name": one.path,
            "label_names": [names[index] for index in one.class_ids],
        }
        for one in found
    ]
    return (json.dumps(entries, indent=1) + "\n").encode()


class Table:
    """Lines for people: a path, then classes and probabilities, in columns.

    Args:
        paths: of all images.
        names: of the classes.
    """

    def __init__(self, paths: Iterable[str], names: Sequence[str]) -> None:
        self.names = [one_line(name) for name in names]
        self.widths = [min(WIDEST, max(map(len, texts))) for texts in (map(one_line, paths), self.names)]

    def line(self, found: Prediction) -> str:
        """Return the line of one image."""
        first, second = self.widths
        likely = zip(found.class_ids, found.scores, strict=True)
        columns = [f"{self.names[index]:<{second}} {score:.4f}" for index, score in likely]
        return "  ".join([f"{one_line(found.path):<{first}}", *columns])
