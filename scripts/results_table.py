"""The tables of measured records, results/NAME.csv and results/NAME_curves.csv: read, checked, written.

A line of NAME.csv is a `Record`; a line of NAME_curves.csv is one epoch of one record, with a column per metric. An
empty field says that the record lacks the value. Whatever does not fit is refused by file and line.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

Key = tuple[str, int]  # cell and seed
Curve = list[dict[str, float]]


class TableError(Exception):
    """A table, or a record, does not fit the schema."""


@dataclass(frozen=True)
class Record:
    """What one run measured. A field that may be None is empty where the record lacks it."""

    cell: str
    seed: int
    last_top1: float  # in percent, like all accuracies
    last_top5: float
    best_top1: float
    best_epoch: int
    seconds: float  # of training and matching
    wall_seconds: float | None  # of the whole command; None where the run was cut and resumed
    parameters: int
    threads: int | None
    cores: int
    bfloat16: bool | None  # whether the processor has it
    processor: str | None
    torch: str
    commit: str | None
    teacher: str | None  # first 16 digits of the SHA-256 of its file, or of a stored teacher; "none": no teacher
    order: int | None  # place of the row in its table, where no list of cells says it
    command: str  # as typed in a shell, absolute paths without their folders
    versions: dict[str, str]  # of Python and of the other packages
    options: dict[str, Any]  # all of them, with defaults and what was found out
    curve: Curve = field(default_factory=list)  # one dict per epoch; stands in the second file

    @property
    def key(self) -> Key:
        return self.cell, self.seed

    @property
    def words(self) -> list[str]:
        return shlex.split(self.command)

    @property
    def had_bfloat16(self) -> bool:
        """Whether the processor has bfloat16; older records that do not say so count as if it had."""
        return self.bfloat16 is not False


COLUMNS = [f.name for f in fields(Record) if f.name != "curve"]
TYPES: dict[str, Any] = {name: kind for name, kind in get_type_hints(Record).items() if name in COLUMNS}
# Older records lack these; one that is written now has them.
NEEDED_NOW = ("threads", "bfloat16", "processor", "teacher")
# Of a curve, beside "cell", "seed" and "epoch".
METRICS = (
    *("train_loss", "train_top1", "valid_top1", "valid_top5", "learning_rate"),
    *("images_per_second", "train_seconds", "match_seconds", "peak_memory_mib"),
)
METRIC = re.compile(r"[a-z][a-z0-9_]*")  # any name that a run logs


def curves_of(path: Path) -> Path:
    """Return the path of the table of curves beside a table of records."""
    return path.with_name(f"{path.stem}_curves.csv")


def read_table(path: Path) -> list[Record]:
    """Read every record with its curve.

    Raises:
        TableError: an unknown column, a missing value, a wrong type, a record without its curve, or the reverse.
    """
    if not path.exists():
        return []
    with _locked(path.parent, fcntl.LOCK_SH):
        rows, curves = _read_rows(path), _read_curves(curves_of(path))
    records = []
    for line, values in rows.values():
        record = Record(**values, curve=curves.pop((values["cell"], values["seed"]), (0, []))[1])
        if problem := _problem(record):
            raise TableError(f"{path}, line {line}: {record.cell}, seed {record.seed}: {problem}")
        records.append(record)
    for (cell, seed), (line, _) in curves.items():
        raise TableError(f"{curves_of(path)}, line {line}: {cell}, seed {seed} has a curve here, no record in {path}")
    return records


def read_keys(path: Path) -> set[Key]:
    """Read the cells and seeds that have a record."""
    if not path.exists():
        return set()
    with _locked(path.parent, fcntl.LOCK_SH):
        return set(_read_rows(path))


def keep_record(path: Path, record: Record) -> None:
    """Insert a record, or replace that of its cell and seed; others may do the same at the same time.

    A kill leaves the table as it was, or without this one record, whose run folder still has everything.

    Raises:
        TableError: the record is incomplete or does not fit; the table does not.
    """
    lacking = [name for name in NEEDED_NOW if getattr(record, name) is None]
    if problem := f"it lacks {', '.join(lacking)}" if lacking else _problem(record):
        raise TableError(f"{record.cell}, seed {record.seed}: {problem}")
    for name, kind in TYPES.items():
        _checked(name, kind, _text(getattr(record, name)), f"{record.cell}, seed {record.seed}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent, fcntl.LOCK_EX):
        rows = {key: values for key, (_, values) in _read_rows(path).items()} if path.exists() else {}
        curves = {key: curve for key, (_, curve) in _read_curves(curves_of(path)).items()}
        if rows.pop(record.key, None):
            _write(path, _lines_of_rows(rows))  # a record never stands beside the curve of another run
        _write(curves_of(path), _lines_of_curves({**curves, record.key: record.curve}))
        _write(path, _lines_of_rows({**rows, record.key: vars(record)}))


def _problem(record: Record) -> str | None:
    """Say in what a record and its curve disagree."""
    if not record.curve:
        return "it has no curve"
    if [epoch["epoch"] for epoch in record.curve] != list(range(len(record.curve))):
        return "its epochs are not 0, 1, 2, ..."
    kept: set[str] = set.intersection(*(set(epoch) for epoch in record.curve))
    lacking = {"train_seconds", "valid_top1", "valid_top5"} - kept
    if lacking:
        return f"its curve lacks {', '.join(sorted(lacking))}"
    for name, value in measures(record.curve).items():
        if repr(getattr(record, name)) != repr(value):
            return f"{name} is {getattr(record, name)}, {value} by its curve"
    return None


def measures(curve: Curve) -> dict[str, Any]:
    """Return what a record says of its curve."""
    best = max(curve, key=lambda epoch: epoch["valid_top1"])
    return {
        "last_top1": curve[-1]["valid_top1"],
        "last_top5": curve[-1]["valid_top5"],
        "best_top1": best["valid_top1"],
        "best_epoch": int(best["epoch"]),
        "seconds": float(sum(epoch["train_seconds"] + epoch.get("match_seconds", 0) for epoch in curve)),
    }


def _text(value: Any) -> str:
    """Write a value so that it reads back exactly."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return value if isinstance(value, str) else repr(value)


def _value(kind: Any, text: str) -> Any:
    """Read a field: the reverse of `_text`."""
    kinds = [k for k in (get_args(kind) if NoneType in get_args(kind) else (kind,)) if k is not NoneType]
    if not text:
        if NoneType in get_args(kind):
            return None
        raise ValueError("nothing")
    plain = getattr(kinds[0], "__origin__", kinds[0])
    if plain is bool:
        value: Any = {"yes": True, "no": False}[text]
    else:
        value = json.loads(text) if plain is dict else plain(text)
    if not isinstance(value, plain) or _text(value) != text:
        raise ValueError("another spelling")
    return value


def _checked(name: str, kind: Any, text: str, where: str) -> Any:
    try:
        return _value(kind, text)
    except (ValueError, KeyError):
        shown = getattr(kind, "__name__", str(kind)) if kind in (int, float, str) else str(kind)
        raise TableError(f"{where}: {name} must be {shown} as Python writes it; got {text!r}") from None


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the lines of a file, each as long as the first."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file, strict=True)
        width = None
        try:
            for row in reader:
                width = len(row) if width is None else width
                if len(row) != width:
                    raise TableError(f"{path}, line {reader.line_num}: {len(row)} fields; the first line has {width}")
                yield reader.line_num, row
        except csv.Error as error:
            raise TableError(f"{path}, line {reader.line_num}: {error}") from None


def _read_rows(path: Path) -> dict[Key, tuple[int, dict[str, Any]]]:
    """Read a table of records: by cell and seed, the line and its values."""
    lines = _lines(path)
    _, header = next(lines, (1, []))
    if header != COLUMNS:
        odd = [n for n in header if n not in COLUMNS] + [n for n in COLUMNS if n not in header] or header
        raise TableError(f"{path}, line 1: columns must be {', '.join(COLUMNS)}; look at {', '.join(odd) or 'it'}")
    rows: dict[Key, tuple[int, dict[str, Any]]] = {}
    for line, texts in lines:
        where = f"{path}, line {line}"
        values = {n: _checked(n, TYPES[n], text, where) for n, text in zip(COLUMNS, texts, strict=True)}
        if (key := (values["cell"], values["seed"])) in rows:
            raise TableError(f"{where}: {key[0]}, seed {key[1]} stands on line {rows[key][0]} too")
        rows[key] = line, values
    return rows


def _read_curves(path: Path) -> dict[Key, tuple[int, Curve]]:
    """Read a table of curves: by cell and seed, the first line and one dict per epoch."""
    if not path.exists():
        return {}
    lines = _lines(path)
    _, header = next(lines, (1, []))
    odd = [name for name in header[3:] if not METRIC.fullmatch(name) or header.count(name) > 1]
    if header[:3] != ["cell", "seed", "epoch"] or odd:
        raise TableError(f"{path}, line 1: columns must be cell, seed, epoch and metrics; look at {odd or header[:3]}")
    curves: dict[Key, tuple[int, Curve]] = {}
    for line, (cell, seed, epoch, *texts) in lines:
        where = f"{path}, line {line}"
        key = _checked("cell", str, cell, where), _checked("seed", int, seed, where)
        values = {n: _checked(n, float, text, where) for n, text in zip(header[3:], texts, strict=True) if text}
        curves.setdefault(key, (line, []))[1].append({"epoch": _checked("epoch", int, epoch, where), **values})
    return curves


def _lines_of_rows(rows: dict[Key, dict[str, Any]]) -> list[list[str]]:
    return [COLUMNS, *([_text(rows[key][name]) for name in COLUMNS] for key in sorted(rows))]


def _lines_of_curves(curves: dict[Key, Curve]) -> list[list[str]]:
    """Join the curves: general metrics first, then those of each term side by side."""
    found = {name for curve in curves.values() for epoch in curve for name in epoch if name != "epoch"}
    if odd := sorted(name for name in found if not METRIC.fullmatch(name)):
        raise TableError(f"a curve has metrics whose names do not fit a column: {', '.join(odd)}")
    names = [*(name for name in METRICS if name in found), *sorted(found - set(METRICS))]
    lines = [["cell", "seed", "epoch", *names]]
    for cell, seed in sorted(curves):
        for epoch in curves[cell, seed]:
            lines.append([cell, str(seed), *(_text(epoch.get(name)) for name in ("epoch", *names))])
    return lines


def _write(path: Path, lines: Iterable[Sequence[str]]) -> None:
    """Replace a file by one step."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """Hold the lock of a folder of tables: one writer, or readers."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)
