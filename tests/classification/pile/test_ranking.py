"""The ranking equals a bounded heap in plain Python, whatever the scores hold."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from classification.errors import UserError
from classification.pile.ranking import Rule, ordered_bits, quantile, rank
from classification.pile.shards import SCHEMA
from tests.reference.ranking import Scored, best_per_class


def write(folder: Path, rows: list[Scored], shards: int = 3) -> list[Path]:
    folder.mkdir(exist_ok=True)
    files = []
    for number in range(shards):
        part = rows[number::shards]
        path, number_of, classes, scores = ([row[place] for row in part] for place in range(4))
        columns = [path, path, number_of, classes, scores, [0.0] * len(part)]
        table = pa.table(dict(zip(SCHEMA.names, columns, strict=True)), SCHEMA)
        files.append(folder / f"{number}.parquet")
        pq.write_table(table, files[-1])
    return files


def random_rows(num: int, classes: int, top: int, values: list[float], seed: int = 0) -> list[Scored]:
    rng = np.random.default_rng(seed)
    rows: list[Scored] = []
    for index in range(num):
        labels = rng.permutation(classes)[:top].tolist()
        scores = sorted(rng.choice(np.array(values, np.float32), top).tolist(), reverse=True)
        rows.append((f"folder/{index}.jpg", int(rng.integers(2**64, dtype=np.uint64)), labels, scores))
    return rows


def ours(files: list[Path], rule: Rule, threads: int = 2) -> dict[int, list[tuple[str, float]]]:
    return {k: [(image.path, image.score) for image in images] for k, images in rank(files, rule, (), threads).lists()}


SMOOTH = np.random.default_rng(1).exponential(3, 4000).astype(np.float32)
CASES = {
    "different scores": (-SMOOTH).tolist(),
    "many ties": [-0.5, -1.0, -2.0],
    "one score alone": [-1.0],
    "zeros of both signs": [0.0, -0.0, -1e-45, 1e-45],
    "positive, tiny, huge and infinite": [3e38, 2.5, 1e-38, -1e-38, -3e38, -math.inf, math.inf],
}


@pytest.mark.parametrize("top_k", [1, 7, 10_000])
@pytest.mark.parametrize("top_p", [1, 3, None])
@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_it_is_a_bounded_heap(values: list[float], top_p: int | None, top_k: int, tmp_path: Path) -> None:
    rows = random_rows(300, classes=6, top=5, values=values)
    found = ours(write(tmp_path, rows), Rule(top_p, top_k))
    assert found == best_per_class(rows, top_p, top_k)
    assert list(found) == sorted(found) and max(map(len, found.values())) == min(top_k, max(map(len, found.values())))


def test_the_order_depends_on_neither_shards_nor_threads(tmp_path: Path) -> None:
    rows = random_rows(500, classes=3, top=2, values=[-1.0, -2.0])
    first = ours(write(tmp_path / "a", rows, 1), Rule(None, 20), threads=1)
    assert first == ours(write(tmp_path / "b", rows[::-1], 7), Rule(None, 20), threads=4)


def test_what_is_missing_counts_for_nothing(tmp_path: Path) -> None:
    rows = random_rows(60, classes=3, top=3, values=[-1.0, -2.0, -3.0])
    empty: list[Scored] = [
        ("null lists", 1, None, None),
        ("no classes", 2, [], []),
        ("a null class", 3, [None, 1], [-0.125, -0.25]),
        ("a null score", 4, [1, 2], [None, -0.25]),
    ]
    found = ours(write(tmp_path, [*rows, *empty]), Rule(None, 5))
    assert found == best_per_class([*rows, *empty], None, 5)
    assert found[1][0] == ("a null class", -0.25) and found[2][0][0] == "a null score"


def test_a_path_counts_once_per_class_with_its_better_score(tmp_path: Path) -> None:
    rows = random_rows(40, classes=2, top=2, values=(-SMOOTH[:50]).tolist())
    again: list[Scored] = [(path, number, classes, [-0.125, -0.25]) for path, number, classes, _ in rows[:15]]
    rows = [*rows, *again, *again, *again, *again]
    for top_k in (1, 3, 10, 39, 100):
        found = ours(write(tmp_path, rows), Rule(None, top_k))
        assert found == best_per_class(rows, None, top_k)
        assert all(len({path for path, _ in images}) == len(images) == min(top_k, 40) for images in found.values())


def test_heaps_larger_than_the_engine_allows(tmp_path: Path) -> None:
    rows = random_rows(300, classes=3, top=3, values=[-1.0, -2.0, -2.5])
    assert ours(write(tmp_path, rows), Rule(None, 1_000_000)) == best_per_class(rows, None, 1_000_000)


def test_more_than_a_million_images_of_a_class(tmp_path: Path) -> None:
    num = 1_000_200
    score = -(np.arange(num) // 2 + 1.0).astype(np.float32)  # pairs of equal scores
    offsets = np.arange(num + 1, dtype=np.int32)
    lists = [pa.ListArray.from_arrays(offsets, values) for values in (np.zeros(num, np.int32), score)]
    names = pa.array(np.char.mod("%d", np.arange(num)))
    table = pa.table(
        dict(zip(SCHEMA.names, [names, names, np.arange(num, dtype=np.uint64), *lists, [0.0] * num], strict=True)),
        SCHEMA,
    )
    pq.write_table(table, tmp_path / "0.parquet")
    ((label, images),) = rank([tmp_path / "0.parquet"], Rule(None, 1_000_001)).lists()
    assert label == 0 and len(images) == 1_000_001
    # The best first; of each pair the one with the larger hash, here the later one.
    assert [image.path for image in images[:4]] == ["1", "0", "3", "2"] and images[-1].path == "1000001"


def test_the_folder_of_temporary_files_may_have_a_quote_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "it's").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "it's"))
    rows = random_rows(20, classes=3, top=2, values=[-0.5, -1.0])
    assert ours(write(tmp_path, rows), Rule(None, 5)) == best_per_class(rows, None, 5)


def test_nan_and_negative_classes_are_refused(tmp_path: Path) -> None:
    rows = random_rows(30, classes=3, top=2, values=[-1.0])
    bad: Scored = ("broken.jpg", 1, [0, 1], [-1.0, math.nan])
    with pytest.raises(UserError, match=r"1 values that are not numbers, first for broken.jpg"):
        rank(write(tmp_path, [*rows, bad]), Rule())
    with pytest.raises(UserError, match="class -1, but classes start at 0"):
        rank(write(tmp_path, [*rows, ("a", 1, [-1], [-1.0])]), Rule())


def test_filters(tmp_path: Path) -> None:
    rows: list[Scored] = [("sure", 1, [0, 1], [-0.125, -3.0]), ("unsure", 2, [0, 1], [-0.5, -0.75])]
    files = write(tmp_path, rows)
    assert ours(files, Rule(min_score=-0.7)) == {0: [("sure", -0.125), ("unsure", -0.5)]}
    assert ours(files, Rule(min_margin=1.0)) == {0: [("sure", -0.125)], 1: [("sure", -3.0)]}
    assert [k for k, _ in rank(files, Rule(), excluded=[1]).lists()] == [0, 1]
    assert all(image.path == "unsure" for _, images in rank(files, Rule(), excluded=[1]).lists() for image in images)
    assert quantile(files, "margin", 0.5) == pytest.approx((2.875 + 0.25) / 2)
    assert quantile(files, "min-score", 1.0) == -0.125


def test_the_bits_are_ordered_as_the_numbers() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 5000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    values = np.concatenate(
        [values[~np.isnan(values)], np.array([0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf], np.float32)]
    )
    bits = np.asarray(ordered_bits(pa.array(values))).astype(np.int64)
    order = np.argsort(values, kind="stable")
    assert (np.sign(np.diff(values[order])) == np.sign(np.diff(bits[order]))).all() or not np.isfinite(values).all()
    smaller, larger = values[order][:-1], values[order][1:]
    assert ((smaller < larger) == (bits[order][:-1] < bits[order][1:])).all()
