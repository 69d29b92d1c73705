"""Run folders as a report reads them: what is there, and what is missing or broken, which a report shows as well."""

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

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # of a checkpoint, what no optimizer changes
FILES = ("best.pth", "last.pth")
LARGEST = 1e300  # beyond it a whole number in a file is no float
MOST_NAMED = 5  # broken lines or files that are named, the others counted


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Args:
        folder: the run folder.
        name: short, another for every run of a report.
        config: of config.json; empty where that cannot be read.
        epochs: one record per finished epoch: numbers by name.
        matchings: of flow/, in order.
        evaluation: of evaluation.json, by role; empty where there is none.
        parameters: of the checkpoint, or None where there is none that can be read.
        megabytes: of its parameters and buffers, likewise.
        digests: first 16 digits of the SHA-256 of each checkpoint, by file name.
        faults: what went wrong, one sentence each.
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
        """The options of the run, by name."""
        return mapping(self.config.get("options"))

    @property
    def arch(self) -> str:
        """The student's network."""
        return str(self.options.get("arch", "unknown"))

    @property
    def teachers(self) -> list[Mapping[str, Any]]:
        """The networks beside the student: frozen teachers, or its peers."""
        found = self.options.get("teachers")
        return [mapping(teacher) for teacher in found] if isinstance(found, list) else []

    @property
    def terms(self) -> list[str]:
        """Names of the terms of its loss."""
        return [str(name) for name in mapping(self.options.get("terms"))]

    def series(self, name: str) -> list[tuple[int, float]]:
        """Return (epoch, value) of the epochs that have a finite value of that name."""
        return [(int(e["epoch"]), e[name]) for e in self.epochs if math.isfinite(e.get(name, math.nan))]

    def last(self, name: str) -> float | None:
        """Return the value of the last epoch that has one."""
        found = self.series(name)
        return found[-1][1] if found else None


def mapping(value: object) -> Mapping[str, Any]:
    """Return a mapping as it is, and an empty one in the place of anything else."""
    return value if isinstance(value, Mapping) else {}


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a run, whole or not."""
    return is_folder(folder) and any(is_file(folder / name) for name in ("config.json", "metrics.jsonl", "last.pth"))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders; one that is named twice is read once.

    Raises:
        UserError: a folder that is no run, or no run with a finished epoch.
    """
    for folder in folders:
        _check_run(folder)
    known = list({folder.resolve(): folder for folder in folders}.values())
    runs = [_read_run(folder, name) for folder, name in zip(known, _names(known), strict=True)]
    if not any(run.epochs for run in runs):
        which = f"{known[0]} has" if len(known) == 1 else f"none of the {len(known)} runs has"
        raise UserError(f"{which} no finished epoch in metrics.jsonl: a report needs at least one")
    return runs


def _check_run(folder: Path) -> None:
    if is_run(folder):
        return
    if not is_folder(folder):
        raise UserError(f"run folder {folder} {'is a file: give its folder' if exists(folder) else 'does not exist'}")
    inside = [folder, folder / "runs"] if is_folder(folder / "runs") else [folder]
    below = sorted(str(path.relative_to(folder)) for top in inside for path in top.iterdir() if is_run(path))
    there = f"; give runs that it holds: {', '.join(below[:5])}{' ...' if len(below) > 5 else ''}" if below else ""
    raise UserError(f"{folder} is no run folder: expected config.json and metrics.jsonl in it{there}")


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path, or as many parts as tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({own[-depth:] for own in parts}) < len(parts):
        depth += 1
    return [one_line("/".join(own[-depth:]).removeprefix("//")) for own in parts]


def _read_run(folder: Path, name: str) -> Run:
    faults: list[str] = []
    config = _object(folder / "config.json", faults)
    epochs = _epochs(folder / "metrics.jsonl", faults)
    matchings = _matchings(folder, faults)
    evaluation = {}
    if is_file(folder / EVALUATION):
        found = _object(folder / EVALUATION, faults)
        evaluation = {role: mapping(entry) for role, entry in found.items() if isinstance(entry, Mapping)}
    faults += _missing(folder)
    run = Run(folder, name, config, epochs, matchings, evaluation, *_size(folder, faults), _digests(folder), faults)
    faults += _shortfalls(run)
    return run


def _object(path: Path, faults: list[str]) -> Mapping[str, Any]:
    """Return the JSON object of a file; an empty one, and a fault, where there is none."""
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
        faults.append(f"{path.name} is damaged: it holds no object")
    except OSError as error:
        faults.append(f"{path.name} cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        faults.append(f"{path.name} is damaged: {error}")
    return {}


def _epochs(path: Path, faults: list[str]) -> list[dict[str, float]]:
    """Return the records of the epochs, in order; a broken line is a fault."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        faults.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    found: dict[int, dict[str, float]] = {}
    broken = []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is None:
            broken.append((number, line))
        else:
            found[int(record["epoch"])] = record
    for number, line in broken[:MOST_NAMED]:
        faults.append(f"line {number} of {path.name} is broken and left out: {quoted(line, 60)}")
    if len(broken) > MOST_NAMED:
        faults.append(f"{len(broken) - MOST_NAMED} more lines of {path.name} are broken and left out")
    return [found[epoch] for epoch in sorted(found)]


def _record(line: bytes) -> dict[str, float] | None:
    """Return the numbers of a line, or None where it is no record of an epoch."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    epoch = content.get("epoch") if isinstance(content, dict) else None
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
        return None
    numbers = {n: v for n, v in content.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {
        name: float(value) if abs(value) < LARGEST or value != value else math.inf for name, value in numbers.items()
    }


def _matchings(folder: Path, faults: list[str]) -> list[Matching]:
    found = []
    for path in files(folder):
        try:
            found.append(read_matching(path))
        except (ValueError, zlib.error) as error:
            faults.append(f"flow/{error}")
    return found


def _missing(folder: Path) -> list[str]:
    faults = [f"{name} is missing" for name in FILES if not is_file(folder / name)]
    bad = folder / "bad_images.txt"
    if is_file(bad):
        faults.append(f"{len(bad.read_bytes().splitlines())} images could not be read and were left out ({bad.name})")
    return faults


def _size(folder: Path, faults: list[str]) -> tuple[int | None, float | None]:
    """Return the number of parameters of the checkpoint, and the megabytes of these and its buffers."""
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
    found = {}
    for name in FILES:
        if is_file(folder / name):
            digest = hashlib.sha256()
            with (folder / name).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            found[name] = digest.hexdigest()[:16]
    return found


def _shortfalls(run: Run) -> list[str]:
    """Return what the records of the epochs lack, or tell of trouble."""
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
    bad = sorted({name for record in run.epochs for name, value in record.items() if not math.isfinite(value)})
    if bad:
        faults.append(f"values that are not finite, in {', '.join(bad[:MOST_NAMED])}{' ...' if bad[5:] else ''}")
    return faults


def planned_epochs(options: Mapping[str, Any]) -> int | None:
    """Return how many epochs a run has when it is done, or None where its options do not say."""
    epochs, warmup = options.get("epochs"), options.get("warmup_epochs") if options.get("warmup") else 0
    return epochs + warmup if isinstance(epochs, int) and isinstance(warmup, int) else None
