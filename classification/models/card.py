"""The model card of an exported network: architecture, preprocessing, origin and accuracy."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from classification.models.trained import Trained

LICENCE = (
    "Nothing here says under which licence these weights may be used: that depends on the training images, and on the "
    "weights that the network or its teacher started from. Ask before you pass them on. The code is under the MIT "
    "licence."
)


def write_card(trained: Trained, file: str) -> str:
    """Return the card in Markdown; origin and accuracy are read from the run folder of the checkpoint.

    Args:
        trained: the network.
        file: name of the exported file.
    """
    folder = trained.path.parent
    parameters = sum(value.numel() for value in trained.network.parameters())
    classes = "not named in the checkpoint" if trained.classes is None else ", ".join(map(_code, trained.classes))
    rows = [
        ("Architecture", _code(trained.arch)),
        ("Parameters", f"{parameters:,}"),
        ("Classes", f"{trained.num_classes}: {classes}"),
        ("Preprocessing", f"RGB, {trained.preprocessing}"),
        ("Checkpoint", _code(trained.path.name)),
        *_origin_rows(_object(folder / "config.json")),
        *_accuracy_rows(folder, trained.path.name),
    ]
    lines = [f"- **{name}:** {value}" for name, value in rows]
    return "\n".join([f"# {_code(file)}", "", "An image classifier.", "", *lines, "", "## Licence", "", LICENCE, ""])


def _code(text: str) -> str:
    """Write a text as code in Markdown, even if it contains backticks."""
    plain = " ".join(text.split())
    ticks = "`" * (1 + max((len(run) for run in plain.replace("`", " ` ").split() if set(run) == {"`"}), default=0))
    return f"{ticks} {plain} {ticks}" if "`" in plain else f"`{plain}`"


def _object(path: Path, text: str | None = None) -> Mapping[str, Any]:
    """Return the JSON object in a text, or else in a file; an empty one if there is none."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_bytes() if text is None else text)
        if isinstance(content, dict):
            return content
    return {}


def _origin_rows(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return teachers, terms, command and commit from a run's config.json."""
    rows = []
    options = config.get("options")
    options = options if isinstance(options, dict) else {}
    teachers, terms = options.get("teachers") or [], options.get("terms")
    if isinstance(terms, dict) and teachers:
        archs = [_code(str(teacher.get("arch"))) for teacher in teachers if isinstance(teacher, dict)]
        rows.append(("Distilled from", f"{', '.join(archs)}; terms of the loss: {', '.join(map(_code, terms))}"))
    if isinstance(command := config.get("command"), list):
        rows.append(("Command", _code(shlex.join(map(str, command)))))
    if isinstance(commit := config.get("commit"), str):
        rows.append(("Code", f"commit {_code(commit)}"))
    return rows


def _accuracy_rows(folder: Path, name: str) -> list[tuple[str, str]]:
    """Return top-1 from evaluation.json, or else from metrics.jsonl: of the best epoch, or of the last for last.pth."""
    student = _object(folder / "evaluation.json").get("student")
    if isinstance(student, dict) and _is_number(student.get("top1")):
        of = f" of {student['images']} images" if isinstance(student.get("images"), int) else ""
        return [("Accuracy", f"top-1 {student['top1']:.2f} %{of} (evaluation.json)")]
    with contextlib.suppress(OSError, ValueError):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        records = [record for line in lines if _is_number((record := _object(folder, line)).get("valid_top1"))]
        accuracies = [float(record["valid_top1"]) for record in records]
        if accuracies and name in ("best.pth", "last.pth"):
            epoch, which = (_best_epoch(folder, records), "best") if name == "best.pth" else (-1, "last")
            top1 = f"top-1 {accuracies[epoch]:.2f} % on the validation images"
            return [("Accuracy", f"{top1}, {which} of {len(accuracies)} epochs")]
    return []


def _best_epoch(folder: Path, records: Sequence[Mapping[str, Any]]) -> int:
    """Return the index of the best epoch by the run's --best-by, the first of several."""
    options = _object(folder / "config.json").get("options")
    measure = options.get("best_by") if isinstance(options, dict) else None
    values = [record.get(f"valid_{measure or 'top1'}") for record in records]
    sign = -1 if measure == "loss" else 1
    measured = [index for index, value in enumerate(values) if _is_number(value)]
    return max(measured, key=lambda index: sign * float(values[index] or 0.0), default=0)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
