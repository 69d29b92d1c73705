"""The result of --evaluate: a table, and evaluation.json."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from classification.errors import UserError
from classification.paths import is_folder
from classification.runs.new_files import write_whole
from classification.runs.scores import Predictions, compare, scores

NAME = "evaluation.json"
HEADINGS = {"top1": "top-1", "top5": "top-5", "loss": "loss", "balanced_accuracy": "balanced", "macro_f1": "macro-F1"}
HEADINGS |= {"ece": "ECE", "parameters": "parameters", "megabytes": "MB"}


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
    found: Mapping[str, Predictions], networks: Mapping[str, tuple[str, nn.Module]], classes: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return what evaluation.json holds: `scores` of every role, its size, and the student beside each other network.

    Args:
        found: predictions by role: "student", "teacher" or "teacher 1" and so on.
        networks: (name, network) by role.
        classes: names in order of index.
    """
    results: dict[str, dict[str, Any]] = {}
    for role, predictions in found.items():
        arch, network = networks[role]
        tensors = (*network.parameters(), *network.buffers())
        size = {
            "parameters": sum(value.numel() for value in network.parameters()),
            "megabytes": sum(value.nbytes for value in tensors) / 1e6,
        }
        results[role] = {"arch": arch, **scores(predictions, classes), **size}
    if "student" in found:
        others = [role for role in found if role != "student"]
        results["student"]["compared"] = {role: compare(found["student"], found[role]) for role in others}
    return results


def table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines that set the networks side by side."""
    width = max(map(len, results))
    lines = [" ".join([" " * width, *(f"{heading:>10}" for heading in HEADINGS.values())])]
    for role, found in results.items():
        places = {"loss": "10.4f", "parameters": "10,d"}
        lines.append(" ".join([f"{role:<{width}}", *(f"{found[key]:{places.get(key, '10.2f')}}" for key in HEADINGS)]))
    for role, both in results.get("student", {}).get("compared", {}).items():
        low, high = both["interval"]
        lines.append(
            f"student minus {role}: {both['top1_difference']:+.2f} points of top-1 (95 % interval {low:+.2f} to "
            f"{high:+.2f}); both say the same class of {both['agreement']:.2f} % of the images"
        )
    return lines


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
