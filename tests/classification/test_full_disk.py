"""Commands whose output does not fit: one sentence, and nothing half-written stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from classification import export, main_base, predict
from tests.classification.refusals import room


def test_what_does_not_fit_is_said_and_leaves_nothing(teacher: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    new, table = tmp_path / "new", tmp_path / "a.csv"
    table.write_text("old")
    evaluate = [str(photos), "--evaluate", "--student-resume", str(teacher), "-j", "0", "--output", str(new)]
    for main, words in (
        (export.main, [str(teacher), "--to", "safetensors", "--output", str(tmp_path / "a.safetensors")]),
        (predict.main, [str(teacher), str(photos / "valid"), "--csv", str(table), "--force", "-j", "0"]),
        (main_base.main, evaluate),
    ):
        with room(200):
            assert main(words) == 2
        said = capsys.readouterr().err
        assert "cannot be written (File too large): make room, or give another --" in said, said
        assert len(said.splitlines()) == 1 + (main is predict.main)  # which says first what it loaded
    assert table.read_text() == "old" and sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "new"]
    assert not list(new.iterdir())
