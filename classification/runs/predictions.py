"""Predictions for images, as files and as lines of a table."""

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
WIDEST = 60  # characters; columns are padded to at most this width


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
    rows = zip(paths, ids.tolist(), scores.tolist(), strict=True)
    return [Prediction(path, ids_, [float(f"{score:.6g}") for score in scores_]) for path, ids_, scores_ in rows]


def class_names(path: Path | None, known: Sequence[str] | None, num_classes: int) -> list[str]:
    """Return the names of the classes: the lines of a file, or else those of the checkpoint, or else the indices.

    Args:
        path: of a file with one name per line, or None.
        known: the checkpoint's names, or None.
        num_classes: K.

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


def to_csv(predictions: Iterable[Prediction], names: Sequence[str]) -> bytes:
    """Return rows of `HEADER`, with ranks from 1; bytes that are not UTF-8 are kept, as in file names."""
    text = io.StringIO(newline="")
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    plain.writerow(HEADER)
    for prediction in predictions:
        for rank, (index, score) in enumerate(zip(prediction.class_ids, prediction.scores, strict=True), 1):
            row = (prediction.path, rank, names[index], score)
            # Python before 3.13 writes a lone carriage return without quotes, which readers take for the end of a row.
            (quoted if "\r" in f"{prediction.path}{names[index]}" else plain).writerow(row)
    return text.getvalue().encode("utf-8", "surrogateescape")


def to_json(predictions: Iterable[Prediction], names: Sequence[str]) -> bytes:
    """Return a list of objects, one per image; bytes that are not UTF-8 are escaped as \\udcXX."""
    entries = [
        {
            "class_ids": prediction.class_ids,
            "scores": prediction.scores,
            "file_name": prediction.path,
            "label_names": [names[index] for index in prediction.class_ids],
        }
        for prediction in predictions
    ]
    return (json.dumps(entries, indent=1) + "\n").encode()


class Table:
    """Lines to print: a path, then classes and probabilities, in columns.

    Args:
        paths: of all images.
        names: of the classes.
    """

    def __init__(self, paths: Iterable[str], names: Sequence[str]) -> None:
        self.names = [one_line(name) for name in names]
        self.widths = [min(WIDEST, max(map(len, texts))) for texts in (map(one_line, paths), self.names)]

    def line(self, prediction: Prediction) -> str:
        """Return the line of one image."""
        first, second = self.widths
        pairs = zip(prediction.class_ids, prediction.scores, strict=True)
        columns = [f"{self.names[index]:<{second}} {score:.4f}" for index, score in pairs]
        return "  ".join([f"{one_line(prediction.path):<{first}}", *columns])
