"""Rank millions of scores by DuckDB: the K best images per class, using memory for about classes x K rows.

Rows of a class are sorted by a 128-bit key: the score, as 32 bits with the same order, above the path's 64-bit hash. So
the order of equal scores does not depend on the number of threads and shards.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from classification.errors import UserError

MOST_IN_HEAP = 1_000_000  # DuckDB's heaps are smaller; for more, all rows are sorted, on disk if necessary
# Statistics to tell images of the classes from other images: larger for images of the classes.
STATISTICS = {
    "min-score": "log_probabilities[1]",
    "margin": "log_probabilities[1] - log_probabilities[2]",
    "energy": "-energy",
}
SORTED = "SELECT class, path, score FROM best ORDER BY class, key DESC"


@dataclass(frozen=True)
class Rule:
    """Which images to choose.

    Args:
        top_p: number of an image's likeliest classes for which it may be chosen; None for all that are stored.
        top_k: number of images per class.
        min_score: smallest log-probability of the class.
        min_margin: smallest difference between the two largest log-probabilities of an image.
        max_energy: largest energy of an image.
    """

    top_p: int | None = None
    top_k: int = 1000
    min_score: float = -math.inf
    min_margin: float = -math.inf
    max_energy: float = math.inf


@dataclass(frozen=True, slots=True)
class Chosen:
    """An image chosen for a class."""

    path: str
    score: float


@dataclass(frozen=True)
class Ranking:
    """The chosen images of every class, best first.

    Args:
        parts: (class, paths, scores) of each class with images, in the order of classes.
    """

    parts: list[tuple[int, pa.Array, pa.Array]]

    def classes(self) -> list[int]:
        """Return the classes with images, in order."""
        return [label for label, _, _ in self.parts]

    def lists(self) -> Iterator[tuple[int, list[Chosen]]]:
        """Yield (class, its images)."""
        for label, paths, scores in self.parts:
            yield label, list(map(Chosen, paths.to_pylist(), scores.to_pylist()))


def ordered_bits(scores: pa.Array) -> pa.Array:
    """Return a uint32 per float32 with the same order; -0 and 0 are equal."""
    bits = (_to_numpy(scores) + np.float32(0)).view(np.uint32)  # -0 + 0 is 0
    return pa.array(np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)))


def _to_numpy(column: pa.Array) -> NDArray[np.float32]:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    numbers: NDArray[np.float32] = np.asarray(array, dtype=np.float32)
    return numbers


def rank(files: Sequence[Path], rule: Rule, excluded: Iterable[int] = (), threads: int | None = None) -> Ranking:
    """Return the K best images per class.

    The first pass finds the K-th best score of each class, with a heap of K floats per class. The second pass selects
    the rows that reach it and sorts them by their keys. NULL entries are ignored. A path that was scored twice counts
    once per class, with its better score.

    Args:
        files: Parquet shards.
        rule: which images to choose.
        excluded: hashes of paths to leave out.
        threads: of DuckDB; None for all cores.

    Raises:
        UserError: a score is NaN, a class is negative, or a shard cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder, duckdb.connect(config=_engine_options(folder, threads)) as engine:
        engine.create_function("ordered_bits", ordered_bits, ["FLOAT"], "UINTEGER", type="arrow")  # type: ignore
        engine.register("excluded_paths", pa.table({"path_hash": pa.array(sorted(excluded), pa.uint64())}))
        values = {"files": [str(file) for file in files], "min_score": rule.min_score}
        num_rows = rule.top_k
        try:
            while True:
                totals = _select_best(engine, values, rule, num_rows)
                parts = list(_take_best(engine.sql(SORTED), rule.top_k))
                num_paths = {label: len(paths) for label, paths, _ in parts}
                if all(num_paths[label] == rule.top_k or total <= num_rows for label, total in totals):
                    return Ranking(parts)
                num_rows *= 2  # rows of paths that were scored twice took places of others
        except duckdb.Error as error:
            raise UserError(f"the shards cannot be ranked: {str(error).splitlines()[0]}") from error


def _engine_options(folder: str, threads: int | None) -> dict[str, str | bool | int | float | list[str]]:
    """Return the options of DuckDB; they are no SQL, so the folder's name may contain quotes."""
    options: dict[str, str | bool | int | float | list[str]] = {
        "temp_directory": folder,
        "preserve_insertion_order": False,
    }
    return options if threads is None else {**options, "threads": threads}


def _select_best(
    engine: duckdb.DuckDBPyConnection, values: dict[str, object], rule: Rule, num_rows: int
) -> list[tuple[int, int]]:
    """Select the rows that reach the score of rank `asked` of their class; return (class, its number of rows)."""
    entries = _rows_query(rule)
    lowest = f"list_min(max(score, {num_rows}))" if num_rows < MOST_IN_HEAP else "'-infinity'::FLOAT"
    engine.execute(
        f"CREATE OR REPLACE TEMP TABLE lows AS SELECT class, {lowest} AS low, count(*) AS total, "
        f"count_if(isnan(score)) AS nans FROM ({entries}) GROUP BY class",
        values,
    )
    _check_rows(engine, entries, values)
    engine.execute(
        "CREATE OR REPLACE TEMP TABLE best AS "
        "SELECT class, (ordered_bits(score)::UHUGEINT << 64) | path_hash::UHUGEINT AS key, path, score "
        f"FROM ({entries}) JOIN lows USING (class) WHERE score >= low",
        values,
    )
    return engine.sql("SELECT class, total FROM lows").fetchall()


def _take_best(rows: duckdb.DuckDBPyRelation, top_k: int) -> Iterator[tuple[int, pa.Array, pa.Array]]:
    """Yield (class, paths, scores) of the first K different paths of each class."""
    label, scores = -1, dict[str, float]()
    for batch in rows.to_arrow_reader(1 << 16):
        for row_class, path, score in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if row_class != label:
                yield from _as_part(label, scores)
                label, scores = row_class, {}
            if len(scores) < top_k:
                scores.setdefault(path, score)
    yield from _as_part(label, scores)


def _as_part(label: int, score_of_path: dict[str, float]) -> list[tuple[int, pa.Array, pa.Array]]:
    scores = pa.array(score_of_path.values(), pa.float32(), size=len(score_of_path))
    return [(label, pa.array(score_of_path, pa.string(), size=len(score_of_path)), scores)] if score_of_path else []


def _rows_query(rule: Rule) -> str:
    """Return the query for (class, score, path, path_hash), one row per image and class."""
    top = "" if rule.top_p is None else f"[1:{rule.top_p}]"
    margin = ""
    if rule.min_margin > -math.inf:
        margin = f"AND {STATISTICS['margin']} >= {rule.min_margin!r}::FLOAT"
    energy = f"AND energy <= {rule.max_energy!r}::FLOAT" if rule.max_energy < math.inf else ""
    return (
        "SELECT class, score, path, path_hash FROM ("
        f"SELECT path, path_hash, unnest(classes{top}) AS class, unnest(log_probabilities{top}) AS score "
        "FROM read_parquet($files) WHERE path IS NOT NULL AND path_hash IS NOT NULL "
        f"AND path_hash NOT IN (SELECT path_hash FROM excluded_paths) {margin} {energy}"
        ") WHERE class IS NOT NULL AND score IS NOT NULL AND score >= $min_score::FLOAT"
    )


def _check_rows(engine: duckdb.DuckDBPyConnection, entries: str, values: dict[str, object]) -> None:
    ((nans, low),) = engine.sql("SELECT sum(nans), min(class) FROM lows").fetchall()
    if nans:
        query = f"SELECT path FROM ({entries}) WHERE isnan(score) LIMIT 1"
        ((path,),) = engine.sql(query, params=values).fetchall()
        raise UserError(
            f"the scores contain {nans} values that are not numbers, first for {path}: score those images again"
        )
    if low is not None and low < 0:
        raise UserError(f"the shards contain class {low}, but classes start at 0: score again")


def quantile(files: Sequence[Path], statistic: str, share: float) -> float:
    """Return the value of a statistic that is above a share of the images.

    Args:
        files: Parquet shards.
        statistic: "min-score", the largest log-probability; "margin", the difference of the two largest ones; or
            "energy", minus the energy.
        share: between 0 and 1.

    Raises:
        UserError: the shards do not have this statistic, or cannot be read.
    """
    query = f"SELECT quantile_cont({STATISTICS[statistic]}, {share!r}) FROM read_parquet($files)"
    try:
        with duckdb.connect() as engine:
            ((value,),) = engine.sql(query, params={"files": [str(file) for file in files]}).fetchall()
    except duckdb.Error as error:
        raise UserError(f"the shards cannot be read: {str(error).splitlines()[0]}") from error
    if value is None or not math.isfinite(value):
        raise UserError(f"the {statistic} cannot be computed from these scores: score with --top-p 2 or more")
    return float(value)
