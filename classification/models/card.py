"""The model card of an exported network: what it is, what it sees, what it was distilled from, how well it does."""

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
    """Return the card in Markdown; the run folder of the checkpoint tells where the network comes from.

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
        *_origin(_object(folder / "config.json")),
        *_accuracy(folder, trained.path.name),
    ]
    lines = [f"- **{name}:** {value}" for name, value in rows]
    return "\n".join([f"# {_code(file)}", "", "An image classifier.", "", *lines, "", "## Licence", "", LICENCE, ""])


def _code(text: str) -> str:
    """Quote a text in Markdown, whatever it holds."""
    plain = " ".join(text.split())
    ticks = "`" * (1 + max((len(run) for run in plain.replace("`", " ` ").split() if set(run) == {"`"}), default=0))
    return f"{ticks} {plain} {ticks}" if "`" in plain else f"`{plain}`"


def _object(path: Path, text: str | None = None) -> Mapping[str, Any]:
    """Return the JSON object of a file, or of a text; an empty one where there is none."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_bytes() if text is None else text)
        if isinstance(found, dict):
            return found
    return {}


def _origin(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a run's config.json says of teachers, terms, command and code."""
    found = []
    options = config.get("options")
    options = options if isinstance(options, dict) else {}
    teachers, terms = options.get("teachers") or [], options.get("terms")
    if isinstance(terms, dict) and teachers:
        archs = [_code(str(teacher.get("arch"))) for teacher in teachers if isinstance(teacher, dict)]
        found.append(("Distilled from", f"{', '.join(archs)}; terms of the loss: {', '.join(map(_code, terms))}"))
    if isinstance(command := config.get("command"), list):
        found.append(("Command", _code(shlex.join(map(str, command)))))
    if isinstance(commit := config.get("commit"), str):
        found.append(("Code", f"commit {_code(commit)}"))
    return found


def _accuracy(folder: Path, name: str) -> list[tuple[str, str]]:
    """Return top-1 of evaluation.json, or of the epochs in metrics.jsonl: the best one, or for last.pth the last."""
    student = _object(folder / "evaluation.json").get("student")
    if isinstance(student, dict) and _is_number(student.get("top1")):
        of = f" of {student['images']} images" if isinstance(student.get("images"), int) else ""
        return [("Accuracy", f"top-1 {student['top1']:.2f} %{of} (evaluation.json)")]
    with contextlib.suppress(OSError, ValueError):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        records = [record for line in lines if _is_number((record := _object(folder, line)).get("valid_top1"))]
        found = [float(record["valid_top1"]) for record in records]
        if found and name in ("best.pth", "last.pth"):
            how, top1 = ("best", found[_best(folder, records)]) if name == "best.pth" else ("last", found[-1])
            return [("Accuracy", f"top-1 {top1:.2f} % on the validation images, {how} of {len(found)} epochs")]
    return []


def _best(folder: Path, records: Sequence[Mapping[str, Any]]) -> int:
    """Return the place of the best epoch by the run's --best-by, the first of equals."""
    options = _object(folder / "config.json").get("options")
    measure = options.get("best_by") if isinstance(options, dict) else None
    values = [record.get(f"valid_{measure or 'top1'}") for record in records]
    sign = -1 if measure == "loss" else 1
    known = [place for place, value in enumerate(values) if _is_number(value)]
    return max(known, key=lambda place: sign * float(values[place] or 0.0), default=0)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
