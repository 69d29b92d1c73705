"""The result of --evaluate: a table, and evaluation.json."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from classification.errors import UserError, one_line
from classification.models.intervals import BETTER, MARGIN, NO_DIFFERENCE, UNDECIDED, WORSE
from classification.paths import is_folder
from classification.runs.scores import Predictions, compare, scores
from classification.system.new_files import write_whole

NAME = "evaluation.json"
WORST = 20  # classes that are printed at most
PERCENT = {"top1": "top-1, %", "top5": "top-5, %"}
REASONS = {
    BETTER: "the interval lies above 0",
    WORSE: "the interval lies below 0",
    NO_DIFFERENCE: f"the interval lies within {MARGIN} points of 0",
    UNDECIDED: "the interval contains 0: more images would make it narrower",
}
SHARES = {"balanced_accuracy": "balanced accuracy, %", "macro_f1": "macro-F1, %", "ece": "calibration error, %"}


def place(output: str | None, checkpoints: Sequence[str | None]) -> Path | None:
    """Return the file: in --output, which is made, or else beside the first checkpoint that there is.

    Raises:
        UserError: --output cannot be made, or written to.
    """
    if output is None:
        given = next((Path(path) for path in checkpoints if path), None)
        return None if given is None else (given if is_folder(given) else given.parent) / NAME
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "no file may have such a name"
        raise UserError(f"--output {output} cannot be made: {cause}") from error
    return Path(output) / NAME


def summary(
    found: Mapping[str, Predictions],
    archs: Mapping[str, str],
    classes: Sequence[str],
    costs: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Return what evaluation.json holds: `scores` of every role, its costs, and the student beside each other network.

    Args:
        found: predictions by role: "student", "teacher" or "teacher 1" and so on.
        archs: name of the network by role.
        classes: names in order of index.
        costs: by role, of `models.cost.costs`.
    """
    results: dict[str, dict[str, Any]] = {}
    for role, predictions in found.items():
        results[role] = {"arch": archs[role], **scores(predictions, classes), **costs[role]}
    if "student" in found:
        others = [role for role in found if role != "student"]
        results["student"]["compared"] = {role: compare(found["student"], found[role]) for role in others}
    return results


def table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines that set the networks side by side, the student first."""
    roles = sorted(results, key=lambda role: role != "student")
    columns = [results[role] for role in roles]
    rows = [("", *roles), ("network", *(found["arch"] for found in columns))]
    rows += [(name, *(f"{found[key]:.2f}" for found in columns)) for key, name in PERCENT.items()]
    rows.append(("loss", *(f"{found['loss']:.4f}" for found in columns)))
    rows += [(name, *(f"{found[key]:.2f}" for found in columns)) for key, name in SHARES.items()]
    rows.append(("parameters", *(f"{found['parameters']:,d}" for found in columns)))
    rows.append(("MB", *(f"{found['megabytes']:.2f}" for found in columns)))
    rows.append(("MACs, million", *(_or_dash(found["macs"], 1e6) for found in columns)))
    for size in columns[0]["latency_ms"]:
        rows.append((f"batch of {size}, ms", *(_or_dash(found["latency_ms"][size]) for found in columns)))
    return [*_aligned(rows), *_differences(results), *_per_class(roles, columns), _machine(columns[0])]


def _or_dash(value: float | None, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line per row: the first column to the left, the others to the right."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([f"{row[0]:<{first}}", *(f"{text:>{width}}" for text, width in zip(row[1:], widths, strict=True))])
        for row in rows
    ]


def _differences(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for role, both in results.get("student", {}).get("compared", {}).items():
        low, high = both["interval"]
        yield (
            f"student minus {role}: {both['top1_difference']:+.2f} points of top-1 (95 % interval {low:+.2f} to "
            f"{high:+.2f}); both say the same class of {both['agreement']:.2f} % of the images"
        )
        yield f"verdict on student and {role}: {both['verdict']}, as {REASONS[both['verdict']]}"


def _per_class(roles: Sequence[str], columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the accuracy of every class; of many classes, those on which the first network is worst."""
    parts = [found["per_class"] for found in columns]
    there = [index for index, entry in enumerate(parts[0]) if entry["images"]]
    heading = "class"
    if len(there) > WORST:
        worst = sorted(there, key=lambda index: parts[0][index]["correct"] / parts[0][index]["images"])[:WORST]
        heading, there = f"the {WORST} worst of {len(there)} classes", worst
    rows = [(heading, "images", *(f"{role}, %" for role in roles))]
    for index in there:
        images = parts[0][index]["images"]
        shares = (f"{100 * part[index]['correct'] / images:.1f}" for part in parts)
        rows.append((one_line(parts[0][index]["name"])[:60], str(images), *shares))
    return _aligned(rows)


def _machine(found: Mapping[str, Any]) -> str:
    return (
        f"MACs: multiplications per image; ms: medians on {found['device']}, threads: {found['threads']}, "
        f"{found['instructions']}"
    )


def keep(results: Mapping[str, Mapping[str, Any]], path: Path | None, *, typed: bool) -> str:
    """Write the file; say where it is.

    Args:
        results: what `summary` returned.
        path: what `place` returned.
        typed: whether --output names its folder; a checkpoint's own folder may be closed.

    Raises:
        UserError: the file cannot be written, and --output names its folder.
    """
    if path is None:
        return f"{NAME} is not written, as no checkpoint has a folder for it: give --output FOLDER"
    results = {
        role: {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in found.items()
        }
        for role, found in results.items()
    }  # JSON has no such numbers
    try:
        write_whole(path, (json.dumps(results, indent=1) + "\n").encode())
    except UserError as error:
        if typed:
            raise
        return f"warning: {error}"
    return f"written to {path}"
