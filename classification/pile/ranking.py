"""The best images per class of millions of scores, by DuckDB: in memory for classes x K rows, ties always the same.

Rows of a class are ordered by one 128-bit key: 32 bits that order scores as numbers do, then the path's hash in the low
64. So the larger hash comes first among equal scores, however many threads and shards there are.
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

MOST_IN_HEAP = 1_000_000  # the engine's heaps hold fewer entries; for more, all rows are sorted, on disk if need be
# Statistics that separate images of the classes from foreign ones: the larger, the less foreign.
STATISTICS = {
    "min-score": "log_probabilities[1]",
    "margin": "log_probabilities[1] - log_probabilities[2]",
    "energy": "-energy",
}
SORTED = "SELECT class, path, score FROM best ORDER BY class, key DESC"


@dataclass(frozen=True)
class Rule:
    """What is chosen.

    Args:
        top_p: classes that an image may be chosen for, most likely first; None for all that are stored.
        top_k: images per class.
        min_score: smallest log-probability of an image for a class.
        min_margin: smallest difference between an image's two largest log-probabilities.
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
    """The images of every class, best first.

    Args:
        parts: class, paths and scores of each class that has images, by class.
    """

    parts: list[tuple[int, pa.Array, pa.Array]]

    def classes(self) -> list[int]:
        """Return the classes that have images, in order."""
        return [label for label, _, _ in self.parts]

    def lists(self) -> Iterator[tuple[int, list[Chosen]]]:
        """Yield every class and its images."""
        for label, paths, scores in self.parts:
            yield label, list(map(Chosen, paths.to_pylist(), scores.to_pylist()))


def ordered_bits(scores: pa.Array) -> pa.Array:
    """Return 32 bits per float32 that are ordered as the numbers are; -0 and 0 have the same."""
    bits = (_numbers(scores) + np.float32(0)).view(np.uint32)  # -0 + 0 is 0
    return pa.array(np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)))


def _numbers(column: pa.Array) -> NDArray[np.float32]:
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    found: NDArray[np.float32] = np.asarray(whole, dtype=np.float32)
    return found


def rank(files: Sequence[Path], rule: Rule, excluded: Iterable[int] = (), threads: int | None = None) -> Ranking:
    """Return the K best images per class.

    A first pass finds each class's K-th best score, in a heap of K floats per class; a second one keeps the rows that
    reach it, and these are sorted by their keys. NULL entries are ignored; a path that was
    scored twice counts once per class, with its better score.

    Args:
        files: Parquet shards.
        rule: what is chosen.
        excluded: hashes of paths to leave out.
        threads: of the engine; None for all cores.

    Raises:
        UserError: a score is NaN, a class is negative, or a shard cannot be read.
    """
    config: dict[str, str | bool | int | float | list[str]] = {} if threads is None else {"threads": threads}
    with tempfile.TemporaryDirectory() as folder, duckdb.connect(config=config) as engine:
        engine.create_function("ordered_bits", ordered_bits, ["FLOAT"], "UINTEGER", type="arrow")  # type: ignore
        engine.execute(f"SET temp_directory = '{folder}'")
        engine.execute("SET preserve_insertion_order = false")
        engine.register("excluded_paths", pa.table({"path_hash": pa.array(sorted(excluded), pa.uint64())}))
        values = {"files": [str(file) for file in files], "min_score": rule.min_score}
        asked = rule.top_k
        try:
            while True:
                totals = _keep_best(engine, values, rule, asked)
                parts = list(_first(engine.sql(SORTED), rule.top_k))
                different = {label: len(paths) for label, paths, _ in parts}
                if all(different[label] == rule.top_k or total <= asked for label, total in totals):
                    return Ranking(parts)
                asked *= 2  # some paths were scored twice
        except duckdb.Error as error:
            raise UserError(f"the shards cannot be ranked: {str(error).splitlines()[0]}") from error


def _keep_best(
    engine: duckdb.DuckDBPyConnection, values: dict[str, object], rule: Rule, asked: int
) -> list[tuple[int, int]]:
    """Keep the rows that reach the score of rank `asked` of their class; return (class, its number of rows)."""
    entries = _entries(rule)
    low = f"list_min(max(score, {asked}))" if asked < MOST_IN_HEAP else "'-infinity'::FLOAT"
    engine.execute(
        f"CREATE OR REPLACE TEMP TABLE lows AS SELECT class, {low} AS low, count(*) AS total, "
        f"count_if(isnan(score)) AS nans FROM ({entries}) GROUP BY class",
        values,
    )
    _check(engine, entries, values)
    engine.execute(
        "CREATE OR REPLACE TEMP TABLE best AS "
        "SELECT class, (ordered_bits(score)::UHUGEINT << 64) | path_hash::UHUGEINT AS key, path, score "
        f"FROM ({entries}) JOIN lows USING (class) WHERE score >= low",
        values,
    )
    return engine.sql("SELECT class, total FROM lows").fetchall()


def _first(rows: duckdb.DuckDBPyRelation, top_k: int) -> Iterator[tuple[int, pa.Array, pa.Array]]:
    """Yield class, paths and scores of the first K different paths of each class."""
    label, found = -1, dict[str, float]()
    for batch in rows.to_arrow_reader(1 << 16):
        for now, path, score in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if now != label:
                yield from _part(label, found)
                label, found = now, {}
            if len(found) < top_k:
                found.setdefault(path, score)
    yield from _part(label, found)


def _part(label: int, found: dict[str, float]) -> list[tuple[int, pa.Array, pa.Array]]:
    scores = pa.array(found.values(), pa.float32(), size=len(found))
    return [(label, pa.array(found, pa.string(), size=len(found)), scores)] if found else []


def _entries(rule: Rule) -> str:
    """Return the query of (class, score, path, path_hash), one row per image and class."""
    most = "" if rule.top_p is None else f"[1:{rule.top_p}]"
    margin = ""
    if rule.min_margin > -math.inf:
        margin = f"AND {STATISTICS['margin']} >= {rule.min_margin!r}::FLOAT"
    energy = f"AND energy <= {rule.max_energy!r}::FLOAT" if rule.max_energy < math.inf else ""
    return (
        "SELECT class, score, path, path_hash FROM ("
        f"SELECT path, path_hash, unnest(classes{most}) AS class, unnest(log_probabilities{most}) AS score "
        "FROM read_parquet($files) WHERE path IS NOT NULL AND path_hash IS NOT NULL "
        f"AND path_hash NOT IN (SELECT path_hash FROM excluded_paths) {margin} {energy}"
        ") WHERE class IS NOT NULL AND score IS NOT NULL AND score >= $min_score::FLOAT"
    )


def _check(engine: duckdb.DuckDBPyConnection, entries: str, values: dict[str, object]) -> None:
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
    """Return the value that a share of the images lies below.

    Args:
        files: Parquet shards.
        statistic: "min-score", the largest log-probability; "margin", the difference of the two largest; or "energy",
            minus the energy.
        share: between 0 and 1.

    Raises:
        UserError: the shards hold no such value.
    """
    query = f"SELECT quantile_cont({STATISTICS[statistic]}, {share!r}) FROM read_parquet($files)"
    try:
        with duckdb.connect() as engine:
            ((found,),) = engine.sql(query, params={"files": [str(file) for file in files]}).fetchall()
    except duckdb.Error as error:
        raise UserError(f"the shards cannot be read: {str(error).splitlines()[0]}") from error
    if found is None or not math.isfinite(found):
        raise UserError(f"the {statistic} cannot be computed from these scores: score with --top-p 2 or more")
    return float(found)
