"""Five SIGKILLs over a small run; scripts/torture.py is the long version."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_a_run_that_is_killed_five_times_ends_as_the_one_left_alone(
    photos: Path, teacher: Path, tmp_path: Path
) -> None:
    import torture

    small = [*torture.OPTIONS, "--img-size", "16", "-b", "4", "--epochs", "10", "--mgd-max-images", "20"]
    words = [str(photos), *small, "--teacher-resume", str(teacher)]
    torture.launch([*words, "--output", str(tmp_path / "alone")])
    kills = {"step": 2, "matching": 1, "evaluation": 1, "checkpoint": 1}
    done = torture.torture(words, tmp_path / "killed", kills, seed=0)
    assert done == kills
    assert torture.differences(tmp_path / "alone", tmp_path / "killed") == []

    # The comparison can fail.
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text()
    (tmp_path / "killed" / "metrics.jsonl").write_text(lines.replace("train_loss", "train_less"))
    assert torture.differences(tmp_path / "alone", tmp_path / "killed") == ["metrics.jsonl"]
