from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from classification.runs.checkpoint import save_arrays
from classification.runs.matchings import (
    Stage,
    changed,
    closeness,
    files,
    ordered,
    read_matching,
)

# Student channel 0 is guided by teacher channels 2 and 0, channel 1 by 1 alone; 3 guides none.
INDEX = np.array([[0, 1], [2, -1]])
COST = np.array([[1.0, 2.0, 0.5, 2.0], [2.0, 0.25, 1.5, 2.0]])
STAGE = Stage("stage 1", INDEX, 4, 1.75, COST)


def test_what_a_stage_says_of_its_pairs() -> None:
    assert STAGE.matrix().tolist() == [[True, False, True, False], [False, True, False, False]]
    assert (STAGE.num_pairs, STAGE.num_student, STAGE.mean_cost) == (3, 2, 1.75 / 3)


def test_rows_stand_by_their_cost_and_columns_by_their_rows() -> None:
    assert ordered(STAGE, 10, 10).tolist() == [[0.25, 2.0, 1.5], [2.0, 1.0, 0.5]]
    assert ordered(STAGE, 1, 10).tolist() == [[0.25]]
    with pytest.raises(ValueError, match="not kept"):
        ordered(Stage("stage 1", INDEX, 4, 1.75, None), 10, 10)


def test_with_fewer_teacher_channels_columns_stand_by_their_cost_and_rows_by_their_columns() -> None:
    wide = Stage("stage 1", np.array([[1, 0, 0]]), 2, 3.0, np.array([[1.5, 0.5], [1.0, 2.0], [1.25, 2.0]]))
    assert ordered(wide, 10, 10).tolist() == [[0.5, 1.5], [2.0, 1.0], [2.0, 1.25]]


def test_a_large_matrix_keeps_whole_rows_with_their_columns() -> None:
    size = 100
    large = Stage("stage 1", np.arange(2 * size).reshape(size, 2).T, 2 * size, 0.0, np.ones((size, 2 * size)))
    assert large.cost is not None
    large.cost[large.matrix()] = 0
    kept = ordered(large, 24, 40)
    assert kept.shape == (20, 40)
    assert (kept == 0).sum() == 40


def test_the_share_of_changed_pairs() -> None:
    after = Stage("stage 1", np.array([[0, 1], [3, -1]]), 4, 1.0, None)
    assert changed(STAGE, after) == pytest.approx(1 / 3)
    assert changed(STAGE, STAGE) == 0
    with pytest.raises(ValueError, match="channels"):
        changed(STAGE, Stage("stage 1", INDEX, 5, 1.0, None))


def test_closeness_is_1_for_the_cheapest_pair() -> None:
    assert closeness(np.array([[0.5, 1.0], [1.5, np.inf]])).tolist() == [[1.0, 0.5], [0.0, 0.0]]
    assert closeness(np.full((1, 2), np.inf)).tolist() == [[0.0, 0.0]]


def test_what_a_run_keeps_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "flow"
    folder.mkdir()
    arrays = {"cost0": COST, "index0": INDEX, "num_teacher0": 4, "total_cost0": 1.75}
    second = {f"ofd_{name}": value for name, value in arrays.items()}
    for epoch in (0, 3):
        save_arrays(folder, {**arrays, **second}, epoch)
    first, last = map(read_matching, files(tmp_path))
    assert (first.epoch, last.epoch) == (0, 3)
    assert [stage.name for stage in last.stages] == ["stage 1", "ofd stage 1"]
    assert first.stages[0].cost is None
    for stage in last.stages:
        assert stage.cost is not None
        np.testing.assert_array_equal(stage.cost, COST)
        np.testing.assert_array_equal(stage.index, INDEX)


@pytest.mark.parametrize(
    "content",
    [
        {"index0": INDEX, "num_teacher0": 2, "total_cost0": 1.0},  # a channel that is not there
        {"index0": INDEX, "num_teacher0": 4},
        {"index0": INDEX[0], "num_teacher0": 4, "total_cost0": 1.0},
        {"index0": INDEX, "num_teacher0": 4, "total_cost0": 1.0, "cost0": COST.T},
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: dict[str, object]) -> None:
    np.savez(tmp_path / "0000.npz", epoch=0, **content)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0000\.npz is damaged"):
        read_matching(tmp_path / "0000.npz")


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0000.npz").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match=r"0000\.npz is damaged"):
        read_matching(tmp_path / "0000.npz")
