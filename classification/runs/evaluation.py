"""The result of --evaluate: a table, and evaluation.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from classification.errors import UserError, one_line
from classification.models.intervals import BETTER, MARGIN, NO_DIFFERENCE, UNDECIDED, WORSE
from classification.paths import is_folder
from classification.runs.folder import make_output
from classification.runs.scores import Predictions, compare, scores
from classification.system.new_files import write_whole

NAME = "evaluation.json"
WORST = 20  # largest number of classes that are printed
PERCENT = {"top1": "top-1, %", "top5": "top-5, %"}
REASONS = {
    BETTER: "the interval lies above 0",
    WORSE: "the interval lies below 0",
    NO_DIFFERENCE: f"the interval lies within {MARGIN} points of 0",
    UNDECIDED: "the interval contains 0: more images would make it narrower",
}
SHARES = {"balanced_accuracy": "balanced accuracy, %", "macro_f1": "macro-F1, %", "ece": "calibration error, %"}


def place(output: str | None, checkpoints: Sequence[str | None]) -> Path | None:
    """Return the path of evaluation.json: in --output, which is made, or else beside the first checkpoint, if any.

    Raises:
        UserError: --output cannot be made, or written to.
    """
    if output is None:
        checkpoint = next((Path(path) for path in checkpoints if path), None)
        return None if checkpoint is None else (checkpoint if is_folder(checkpoint) else checkpoint.parent) / NAME
    make_output(Path(output))
    return Path(output) / NAME


def summary(
    predictions: Mapping[str, Predictions],
    archs: Mapping[str, str],
    classes: Sequence[str],
    costs: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Return the content of evaluation.json: scores and costs by role, and the student compared with the others.

    Args:
        predictions: by role: "student", "teacher" or "teacher 1" and so on.
        archs: name of the network by role.
        classes: names in order of index.
        costs: by role, as `models.cost.measure_costs` returns them.
    """
    results: dict[str, dict[str, Any]] = {}
    for role, own in predictions.items():
        results[role] = {"arch": archs[role], **scores(own, classes), **costs[role]}
    if "student" in predictions:
        student = predictions["student"]
        others = {role: own for role, own in predictions.items() if role != "student"}
        results["student"]["compared"] = {role: compare(student, other) for role, other in others.items()}
    return results


def table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table with one column per network, the student first."""
    roles = sorted(results, key=lambda role: role != "student")
    columns = [results[role] for role in roles]
    rows = [("", *roles), ("network", *(column["arch"] for column in columns))]
    rows += [(name, *(f"{column[key]:.2f}" for column in columns)) for key, name in PERCENT.items()]
    rows.append(("loss", *(f"{column['loss']:.4f}" for column in columns)))
    rows += [(name, *(f"{column[key]:.2f}" for column in columns)) for key, name in SHARES.items()]
    rows.append(("parameters", *(f"{column['parameters']:,d}" for column in columns)))
    rows.append(("MB", *(f"{column['megabytes']:.2f}" for column in columns)))
    rows.append(("MACs, million", *(_or_dash(column["macs"], 1e6) for column in columns)))
    for size in columns[0]["latency_ms"]:
        rows.append((f"batch of {size}, ms", *(_or_dash(column["latency_ms"][size]) for column in columns)))
    return [*_aligned(rows), *_differences(results), *_per_class(roles, columns), _machine(columns[0])]


def _or_dash(value: float | None, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line per row, with the first column aligned left and the others right."""
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
    parts = [column["per_class"] for column in columns]
    indices = [index for index, entry in enumerate(parts[0]) if entry["images"]]
    heading = "class"
    if len(indices) > WORST:
        worst = sorted(indices, key=lambda index: parts[0][index]["correct"] / parts[0][index]["images"])[:WORST]
        heading, indices = f"the {WORST} worst of {len(indices)} classes", worst
    rows = [(heading, "images", *(f"{role}, %" for role in roles))]
    for index in indices:
        images = parts[0][index]["images"]
        shares = (f"{100 * part[index]['correct'] / images:.1f}" for part in parts)
        rows.append((one_line(parts[0][index]["name"])[:60], str(images), *shares))
    return _aligned(rows)


def _machine(entry: Mapping[str, Any]) -> str:
    return (
        f"MACs: multiplications per image; ms: medians on {entry['device']}, threads: {entry['threads']}, "
        f"{entry['instructions']}"
    )


def keep(results: Mapping[str, Mapping[str, Any]], path: Path | None, *, typed: bool) -> str:
    """Write evaluation.json; return a line that says where it is, or why it is not written.

    Args:
        results: what `summary` returned.
        path: what `place` returned.
        typed: whether --output names its folder; that of a checkpoint may be read-only.

    Raises:
        UserError: the file cannot be written, and --output names its folder.
    """
    if path is None:
        return f"{NAME} is not written, as no checkpoint has a folder for it: give --output FOLDER"
    # NaN and infinity are not JSON.
    results = {
        role: {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()
        }
        for role, entry in results.items()
    }
    try:
        write_whole(path, (json.dumps(results, indent=1) + "\n").encode())
    except UserError as error:
        if typed:
            raise
        return f"warning: {error}"
    return f"written to {path}"
