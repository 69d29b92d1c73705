"""--sampler balanced and --class-weights balanced in a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from classification import main_base
from tests.classification.conftest import SMALL, write_photos


@pytest.fixture
def differences() -> Any:
    import torture

    return torture.differences


@pytest.fixture
def unequal(tmp_path: Path) -> Path:
    """Nine images of two classes, three of the third."""
    root = write_photos(tmp_path / "photos", train=9, valid=3)
    for path in sorted((root / "train" / "sky").iterdir())[3:]:
        path.unlink()
    return root


def curve(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_is_cut_continues_as_if_uncut(unequal: Path, tmp_path: Path, differences: Any) -> None:
    words = [str(unequal), "-a", "cifar_resnet8_w0.5", *SMALL]
    both = [*words, "--sampler", "balanced", "--class-weights", "balanced"]
    for run, epochs in (("whole", 3), ("cut", 1), ("cut", 3)):
        place = ["--epochs", str(epochs), "--resume", "auto", "--output", str(tmp_path / run)]
        assert main_base.main([*both, *place]) == 0
    assert differences(tmp_path / "cut", tmp_path / "whole") == []
    assert main_base.main([*words, "--epochs", "1", "--output", str(tmp_path / "plain")]) == 0
    assert curve(tmp_path / "plain")[0]["train_loss"] != curve(tmp_path / "whole")[0]["train_loss"]


def test_a_run_without_the_option_is_not_resumed_with_it(
    unequal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(unequal), "-a", "cifar_resnet8_w0.5", *SMALL, "--resume", "auto", "--output", str(tmp_path / "run")]
    assert main_base.main([*words, "--epochs", "1"]) == 0
    capsys.readouterr()
    assert main_base.main([*words, "--epochs", "2", "--sampler", "balanced"]) == 2
    assert "--sampler balanced, was None" in capsys.readouterr().err
