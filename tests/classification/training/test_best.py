"""--best-by: which epoch is kept as best.pth, and that a run keeps its measure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from classification import main_base
from tests.classification.conftest import SMALL, STUDENT


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_best_pth_is_chosen_by_the_measure_that_was_asked_for(photos: Path, tmp_path: Path) -> None:
    """Of unequal classes the measures differ: each run keeps the epoch that its own records call the best."""
    data = tmp_path / "photos"
    shutil.copytree(photos, data)
    for file in sorted((data / "valid" / "sky").iterdir())[1:]:
        file.unlink()
    for measure in ("balanced_accuracy", "macro_f1", "loss"):
        folder = tmp_path / measure
        words = [str(data), "-a", STUDENT, *SMALL, "--output", str(folder), "--best-by", measure]
        assert main_base.main([*words, "--epochs", "2", "--checkpoint-every-steps", "2"]) == 0
        assert main_base.main([*words, "--epochs", "3", "--resume", "auto"]) == 0
        found = records(folder)
        added = {key for record in found for key in record} & {"valid_balanced_accuracy", "valid_macro_f1"}
        assert added == {f"valid_{measure}"} - {"valid_loss"}
        values = [record[f"valid_{measure}"] for record in found]
        best = values.index(min(values) if measure == "loss" else max(values))
        assert main_base.main([str(data), "--evaluate", "--student-resume", str(folder / "best.pth"), "-j", "0"]) == 0
        student = json.loads((folder / "evaluation.json").read_text())["student"]
        assert student[measure] == pytest.approx(values[best]) and student["loss"] == pytest.approx(
            found[best]["valid_loss"]
        )


def test_a_run_keeps_its_measure(photos: Path, tmp_path: Path, capsys: Any) -> None:
    folder = str(tmp_path / "run")
    words = [str(photos), "-a", STUDENT, *SMALL, "--output", folder]
    assert main_base.main([*words, "--best-by", "macro_f1", "--epochs", "1"]) == 0
    assert "best macro_f1" in capsys.readouterr().out
    assert main_base.main([*words, "--epochs", "2", "--resume", "auto"]) == 2
    assert "--best-by top1, was macro_f1" in capsys.readouterr().err
    assert main_base.main(["--resume", folder, "--epochs", "2"]) == 0
    assert "valid_macro_f1" in records(Path(folder))[1]
    last = torch.load(Path(folder, "last.pth"), weights_only=True)
    del last["resume"]["config"]["options"]["best_by"]  # as a run of before there was such an option
    torch.save(last, Path(folder, "last.pth"))
    assert main_base.main([*words, "--epochs", "3", "--resume", "auto"]) == 0
    assert main_base.main([*words, "--best-by", "f1"]) == 2 and "macro_f1" in capsys.readouterr().err
