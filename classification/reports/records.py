"""Read run folders for a report. Missing or damaged files are faults, which the report shows."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from classification.errors import UserError, one_line, quoted
from classification.models.weights import read_weights
from classification.paths import exists, is_file, is_folder
from classification.runs.evaluation import NAME as EVALUATION
from classification.runs.matchings import Matching, files, read_matching

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # tensors of a checkpoint that are not parameters
FILES = ("best.pth", "last.pth")
MAX_FLOAT = 1e300  # larger integers in a file cannot be converted to floats
MOST_NAMED = 5  # broken lines or values that are named; the others are counted


@dataclass(frozen=True)
class Run:
    """The content of a run folder.

    Args:
        folder: the run folder.
        name: a short name, unique in the report.
        config: of config.json; empty if it cannot be read.
        epochs: one record per finished epoch: {name: number}.
        matchings: of flow/, in order.
        evaluation: of evaluation.json, by role; empty if there is none.
        parameters: number of parameters of the checkpoint, or None if it cannot be read.
        megabytes: of its parameters and buffers, or None if it cannot be read.
        digests: first 16 digits of the SHA-256 of each checkpoint, by file name.
        faults: what is missing or went wrong, one sentence each.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    epochs: list[dict[str, float]]
    matchings: list[Matching]
    evaluation: Mapping[str, Mapping[str, Any]]
    parameters: int | None
    megabytes: float | None
    digests: Mapping[str, str]
    faults: list[str] = field(default_factory=list)

    @property
    def options(self) -> Mapping[str, Any]:
        """The options by name."""
        return as_mapping(self.config.get("options"))

    @property
    def arch(self) -> str:
        """The student's network."""
        return str(self.options.get("arch", "unknown"))

    @property
    def teachers(self) -> list[Mapping[str, Any]]:
        """The descriptions of the other networks: frozen teachers, or peers of the student."""
        entries = self.options.get("teachers")
        return [as_mapping(teacher) for teacher in entries] if isinstance(entries, list) else []

    @property
    def terms(self) -> list[str]:
        """The names of the loss's terms."""
        return [str(name) for name in as_mapping(self.options.get("terms"))]

    def series(self, name: str) -> list[tuple[int, float]]:
        """Return (epoch, value) of all epochs with a finite value of this name."""
        return [(int(e["epoch"]), e[name]) for e in self.epochs if math.isfinite(e.get(name, math.nan))]

    def last(self, name: str) -> float | None:
        """Return the last finite value of this name, or None."""
        entries = self.series(name)
        return entries[-1][1] if entries else None


def as_mapping(value: object) -> Mapping[str, Any]:
    """Return a mapping as it is, and an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run folder, complete or not."""
    return is_folder(folder) and any(is_file(folder / name) for name in ("config.json", "metrics.jsonl", "last.pth"))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, each once.

    Raises:
        UserError: a folder is not a run, or no run has a finished epoch.
    """
    for folder in folders:
        _check_run(folder)
    unique = list({folder.resolve(): folder for folder in folders}.values())
    runs = [_read_run(folder, name) for folder, name in zip(unique, _unique_names(unique), strict=True)]
    if not any(run.epochs for run in runs):
        subject = f"{unique[0]} has" if len(unique) == 1 else f"none of the {len(unique)} runs has"
        raise UserError(f"{subject} no finished epoch in metrics.jsonl: a report needs at least one")
    return runs


def _check_run(folder: Path) -> None:
    if is_run(folder):
        return
    if not is_folder(folder):
        raise UserError(f"run folder {folder} {'is a file: give its folder' if exists(folder) else 'does not exist'}")
    searched = [folder, folder / "runs"] if is_folder(folder / "runs") else [folder]
    runs = sorted(str(path.relative_to(folder)) for top in searched for path in top.iterdir() if is_run(path))
    hint = f"; give runs that it holds: {', '.join(runs[:5])}{' ...' if len(runs) > 5 else ''}" if runs else ""
    raise UserError(f"{folder} is no run folder: expected config.json and metrics.jsonl in it{hint}")


def _unique_names(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path, or as many parts as make the names unique."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({path_parts[-depth:] for path_parts in parts}) < len(parts):
        depth += 1
    return [one_line("/".join(path_parts[-depth:]).removeprefix("//")) for path_parts in parts]


def _read_run(folder: Path, name: str) -> Run:
    faults: list[str] = []
    config = _object(folder / "config.json", faults)
    epochs = _epochs(folder / "metrics.jsonl", faults)
    matchings = _matchings(folder, faults)
    evaluation = {}
    if is_file(folder / EVALUATION):
        roles = _object(folder / EVALUATION, faults)
        evaluation = {role: as_mapping(entry) for role, entry in roles.items() if isinstance(entry, Mapping)}
    faults += _missing_files(folder)
    run = Run(folder, name, config, epochs, matchings, evaluation, *_size(folder, faults), _digests(folder), faults)
    faults += _epoch_faults(run)
    return run


def _object(path: Path, faults: list[str]) -> Mapping[str, Any]:
    """Return the JSON object of a file; if that fails, add a fault and return an empty one."""
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
        faults.append(f"{path.name} is damaged: it holds no object")
    except OSError as error:
        faults.append(f"{path.name} cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        faults.append(f"{path.name} is damaged: {error}")
    return {}


def _epochs(path: Path, faults: list[str]) -> list[dict[str, float]]:
    """Return the records of the epochs, in order; add a fault for each broken line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        faults.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    records: dict[int, dict[str, float]] = {}
    broken = []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is None:
            broken.append((number, line))
        else:
            records[int(record["epoch"])] = record
    for number, line in broken[:MOST_NAMED]:
        faults.append(f"line {number} of {path.name} is broken and left out: {quoted(line, 60)}")
    if len(broken) > MOST_NAMED:
        faults.append(f"{len(broken) - MOST_NAMED} more lines of {path.name} are broken and left out")
    return [records[epoch] for epoch in sorted(records)]


def _record(line: bytes) -> dict[str, float] | None:
    """Return the numbers in a line, or None if it is not the record of an epoch."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    epoch = content.get("epoch") if isinstance(content, dict) else None
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
        return None
    numbers = {n: v for n, v in content.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {
        name: float(value) if abs(value) < MAX_FLOAT or value != value else math.inf for name, value in numbers.items()
    }


def _matchings(folder: Path, faults: list[str]) -> list[Matching]:
    matchings = []
    for path in files(folder):
        try:
            matchings.append(read_matching(path))
        except (ValueError, zlib.error) as error:
            faults.append(f"flow/{error}")
    return matchings


def _missing_files(folder: Path) -> list[str]:
    faults = [f"{name} is missing" for name in FILES if not is_file(folder / name)]
    bad = folder / "bad_images.txt"
    if is_file(bad):
        faults.append(f"{len(bad.read_bytes().splitlines())} images could not be read and were left out ({bad.name})")
    return faults


def _size(folder: Path, faults: list[str]) -> tuple[int | None, float | None]:
    """Return the number of parameters of the checkpoint, and the megabytes of its parameters and buffers."""
    path = next((folder / name for name in FILES if is_file(folder / name)), None)
    if path is None:
        return None, None
    try:
        state = next(iter(read_weights(path).states.values()))
    except UserError as error:
        faults.append(str(error))
        return None, None
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    parameters = sum(value.numel() for name, value in tensors.items() if not name.endswith(BUFFERS))
    return parameters, sum(value.nbytes for value in tensors.values()) / 1e6


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for name in FILES:
        if is_file(folder / name):
            digest = hashlib.sha256()
            with (folder / name).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            digests[name] = digest.hexdigest()[:16]
    return digests


def _epoch_faults(run: Run) -> list[str]:
    """Return faults from the records of the epochs: missing epochs, skipped steps, values that are not finite."""
    faults = []
    planned, done = planned_epochs(run.options), len(run.epochs)
    if planned is not None and done < planned:
        faults.append(f"cut short: {done} of {planned} epochs are finished")
    elif planned is None and run.config:
        faults.append("config.json does not say how many epochs were planned")
    if gaps := [n for n, record in enumerate(run.epochs) if record["epoch"] != n][:1]:
        faults.append(f"metrics.jsonl lacks epoch {gaps[0]}, counted from 0")
    if skipped := sum(record.get("skipped_steps", 0) > 0 for record in run.epochs):
        last = int(run.epochs[-1].get("skipped_steps", 0))
        faults.append(f"{last} steps were left out because a loss or gradient was not finite (in {skipped} epochs)")
    not_finite = sorted({name for record in run.epochs for name, value in record.items() if not math.isfinite(value)})
    if not_finite:
        faults.append(
            f"values that are not finite, in {', '.join(not_finite[:MOST_NAMED])}{' ...' if not_finite[5:] else ''}"
        )
    return faults


def planned_epochs(options: Mapping[str, Any]) -> int | None:
    """Return the number of epochs of a complete run, or None if its options do not say it."""
    epochs, warmup = options.get("epochs"), options.get("warmup_epochs") if options.get("warmup") else 0
    return epochs + warmup if isinstance(epochs, int) and isinstance(warmup, int) else None
