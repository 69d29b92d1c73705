"""Read the matchings that a run keeps in flow/NNNN.npz: indices of every update, costs of the last one."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

INDEX = re.compile(r"(?P<term>.*?)_?index(?P<number>\d+)")

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Stage:
    """The matching at one tap.

    Args:
        name: "stage 1" and so on, after the name of its term if several terms match.
        index: teacher channels of each student channel, (G, S); -1 for an empty slot.
        num_teacher: T.
        total_cost: sum over the matched pairs.
        cost: (S, T), or None if the update is not the last one.
    """

    name: str
    index: Integers
    num_teacher: int
    total_cost: float
    cost: Floats | None

    @property
    def num_student(self) -> int:
        """S."""
        return int(self.index.shape[1])

    @property
    def num_pairs(self) -> int:
        """Number of matched pairs."""
        return int((self.index >= 0).sum())

    @property
    def mean_cost(self) -> float:
        """Mean cost of the matched pairs: 2 - 2 cos."""
        return self.total_cost / max(1, self.num_pairs)

    def matrix(self) -> NDArray[np.bool_]:
        """Return which pairs are matched, (S, T)."""
        slots, students = np.nonzero(self.index >= 0)
        matrix = np.zeros((self.num_student, self.num_teacher), dtype=np.bool_)
        matrix[students, self.index[slots, students]] = True
        return matrix


@dataclass(frozen=True)
class Matching:
    """The matchings of the terms before an epoch.

    Args:
        epoch: counted from 0.
        stages: one per tap, teacher by teacher.
    """

    epoch: int
    stages: list[Stage]


def files(run: Path) -> list[Path]:
    """Return the files of a run folder's matchings, in their order."""
    return sorted((run / "flow").glob("[0-9]*.npz"))


def read_matching(path: Path) -> Matching:
    """Read one file.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        with np.load(path) as saved:
            matches = [match for match in map(INDEX.fullmatch, saved.files) if match]
            stages = [_stage(saved, match["term"], int(match["number"])) for match in matches]
            return Matching(int(saved["epoch"]), stages)
    except (OSError, EOFError, KeyError, IndexError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} is damaged: {' '.join(str(error).split())}") from error


def _stage(saved: np.lib.npyio.NpzFile, term: str, number: int) -> Stage:
    prefix = f"{term}_" if term else ""
    index = np.asarray(saved[f"{prefix}index{number}"], dtype=np.int64)
    num_teacher, total = int(saved[f"{prefix}num_teacher{number}"]), float(saved[f"{prefix}total_cost{number}"])
    key = f"{prefix}cost{number}"
    cost = np.asarray(saved[key], dtype=np.float64) if key in saved.files else None
    if index.ndim != 2 or index.size == 0 or index.min() < -1 or index.max() >= num_teacher:
        raise ValueError(f"{prefix}index{number} is not a matching of {num_teacher} teacher channels")
    if cost is not None and cost.shape != (index.shape[1], num_teacher):
        raise ValueError(f"{key} has the shape {cost.shape}, expected {(index.shape[1], num_teacher)}")
    return Stage(f"{term} stage {number + 1}".strip(), index, num_teacher, total, cost)


def changed(before: Stage, after: Stage) -> float:
    """Return the share of the pairs of `before` that `after` does not have.

    Raises:
        ValueError: the numbers of channels differ.
    """
    old, new = before.matrix(), after.matrix()
    if old.shape != new.shape:
        raise ValueError(f"matchings of {old.shape} and {new.shape} channels have no pairs in common")
    return 1 - float((old & new).sum()) / max(1, before.num_pairs)


def ordered(stage: Stage, most_rows: int, most_columns: int) -> Floats:
    """Return the costs with the matched pairs along the diagonal.

    Student channels are sorted by their matched cost, best first, and teacher channels like the student channels that
    they guide. If there are more student than teacher channels, the two are exchanged. Of a large matrix, evenly spaced
    student channels are kept, with their teacher channels.

    Args:
        stage: with its costs.
        most_rows: largest number of rows of the result.
        most_columns: largest number of columns of the result.

    Raises:
        ValueError: the costs of this matching were not kept.
    """
    if stage.cost is None:
        raise ValueError("the costs of this matching were not kept")
    if stage.num_student <= stage.num_teacher:
        return _along_diagonal(stage.cost, stage.matrix(), most_rows, most_columns)
    return _along_diagonal(stage.cost.T, stage.matrix().T, most_columns, most_rows).T


def _along_diagonal(cost: Floats, matched: NDArray[np.bool_], most_rows: int, most_columns: int) -> Floats:
    counts = matched.sum(1)
    means = np.where(counts > 0, np.where(matched, cost, 0.0).sum(1) / np.maximum(counts, 1), np.inf)
    rows = np.argsort(means, kind="stable")
    per_row = -(-cost.shape[1] // cost.shape[0])
    keep = max(1, min(len(rows), most_rows, most_columns // per_row))
    rows = rows[np.linspace(0, len(rows) - 1, keep).round().astype(int)]
    columns = np.concatenate([np.flatnonzero(matched[row]) for row in rows])[:most_columns]
    part: Floats = cost[np.ix_(rows, columns)] if len(columns) else cost[rows][:, :most_columns]
    return part


def closeness(cost: Floats) -> Floats:
    """Scale costs to 1 for the lowest and 0 for the highest; forbidden pairs are 0."""
    finite = cost[np.isfinite(cost)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    scaled = (high - np.where(np.isfinite(cost), cost, high)) / (high - low or 1.0)
    return np.clip(scaled, 0.0, 1.0)
