"""What terms keep of their updates: the files flow/NNNN.npz of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from classification.runs.checkpoint import save_arrays


def kept(folder: Path) -> dict[str, dict[str, list[int]]]:
    return {path.name: {n: v.tolist() for n, v in np.load(path).items()} for path in sorted(folder.glob("*.npz"))}


def update(number: int) -> dict[str, np.ndarray]:
    return {"index0": np.array([number]), "cost0": np.array([10 * number])}


def test_files_count_updates_and_costs_stay_in_the_last_one(tmp_path: Path) -> None:
    for number, epoch in enumerate((0, 3, 4)):
        save_arrays(tmp_path, update(number), epoch)
    assert kept(tmp_path) == {
        "0000.npz": {"epoch": 0, "index0": [0]},
        "0001.npz": {"epoch": 3, "index0": [1]},
        "0002.npz": {"epoch": 4, "index0": [2], "cost0": [20]},
    }


def test_a_resumed_run_replaces_what_its_cut_one_kept_of_the_same_epoch(tmp_path: Path) -> None:
    for number, epoch in ((0, 0), (1, 2), (7, 2)):
        save_arrays(tmp_path, update(number), epoch)
    assert kept(tmp_path) == {
        "0000.npz": {"epoch": 0, "index0": [0]},
        "0001.npz": {"epoch": 2, "index0": [7], "cost0": [70]},
    }


def test_a_run_resumed_from_an_earlier_epoch_keeps_no_files_of_later_ones(tmp_path: Path) -> None:
    for number, epoch in ((0, 0), (1, 2), (2, 4), (3, 6), (7, 3)):
        save_arrays(tmp_path, update(number), epoch)
    assert kept(tmp_path) == {
        "0000.npz": {"epoch": 0, "index0": [0]},
        "0001.npz": {"epoch": 2, "index0": [1]},
        "0002.npz": {"epoch": 3, "index0": [7], "cost0": [70]},
    }


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", a=np.array([1]))
    save_arrays(tmp_path, update(0), 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.npz", "mine.npz"]
