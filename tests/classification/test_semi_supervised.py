"""semi_supervised.py: its steps, its control, its verdict, and what it refuses."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from classification.semi_supervised import control_epochs, main
from tests.classification.conftest import STUDENT, TEACHER, picture

SMALL = ["-a", STUDENT, "-b", "9", "-j", "0", "--img-size", "16", "--pretrain-epochs", "2", "--finetune-epochs", "1"]


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pile")
    (folder / "deep").mkdir()
    rng = np.random.default_rng(99)
    for index in range(24):
        picture(index % 3, rng).save(folder / "deep" / f"{index}.png")
    return folder


def test_the_control_takes_as_many_steps() -> None:
    args = argparse.Namespace(batch_size=10, pretrain_epochs=3, finetune_epochs=4)
    # 3 epochs of 10 steps and 4 of 2 make 38 steps, 19 epochs of 2.
    assert control_epochs(args, labelled=20, listed=100) == 19
    assert control_epochs(args, labelled=2000, listed=5) == 4


def test_seven_steps_once_and_the_same_line_again(
    photos: Path, teacher: Path, pile: Path, tmp_path: Path, capfd: Any
) -> None:
    folder = tmp_path / "semi"
    words = [str(photos), "--unlabelled", str(pile), "--teacher", str(teacher), "--output", str(folder), *SMALL]
    assert main([*words, "--", "--train-crop", "pad"]) == 0
    said = capfd.readouterr().out
    names = ["teacher", "scores", "selection", "pretrain", "student", "control", "evaluation"]
    assert [line.split()[1][:-1] for line in said.splitlines() if ".py " in line and "to evaluate" not in line] == names
    epochs = {name: len((folder / name / "metrics.jsonl").read_text().splitlines()) for name in names[3:6]}
    lines = [line.split() for line in (folder / "chosen.txt").read_text().splitlines()]
    assert {path.split("/")[0] for path, _, _ in lines} == {"deep"}
    steps = 2 * math.ceil(len(lines) / 9) + 3  # of the 27 labelled images in batches of 9, 3 make an epoch
    assert epochs == {"pretrain": 2, "student": 1, "control": round(steps / 3)}
    options = json.loads((folder / "student" / "config.json").read_text())["options"]
    assert options["student_resume"] == str(folder / "pretrain" / "last.pth") and options["train_crop"] == "pad"
    assert json.loads((folder / "teacher" / "evaluation.json").read_text())["student"]["arch"] == TEACHER
    found = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert f"student {found['student']['top1']:.2f}" in said
    word = said.splitlines()[-1]
    assert word in ("BETTER", "NO DIFFERENCE", "WORSE", "UNDECIDED")
    assert main([*words, "--", "--train-crop", "pad"]) == 0
    again = capfd.readouterr().out.splitlines()
    assert [line.split()[1][:-1] for line in again if "done before" in line] == names and again[-1] == word
    assert main(words) == 2
    assert "was begun with more ['--train-crop', 'pad'], now []: type the same line" in capfd.readouterr().err


def held(root: Path, photos: Path) -> None:
    shutil.copy(photos / "valid" / "dot" / "3.png", root / "pile" / "copy.png")


def empty(root: Path, _: Path) -> None:
    shutil.rmtree(root / "pile")
    (root / "pile").mkdir()


def nothing(*_: Path) -> None:
    """Leave all as it is."""


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (held, [], "holds 1 image of valid, for example"),
        (empty, [], "no image found in"),
        (nothing, ["--unlabelled", "nowhere"], "--unlabelled nowhere is not a folder"),
        (nothing, ["--teacher", "nowhere.pth"], "checkpoint nowhere.pth does not exist"),
        (nothing, ["--teacher", "OTHER"], "has other classes than"),
        (nothing, ["--output", "PHOTOS"], "contains other files: give another folder"),
        (nothing, ["--pretrain-epoch", "3"], "close ones are --pretrain-epochs"),
    ],
)
def test_mistakes_are_one_sentence(
    change: Any, words: list[str], message: str, photos: Path, teacher: Path, pile: Path, tmp_path: Path, capsys: Any
) -> None:
    import torch

    shutil.copytree(pile, tmp_path / "pile")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "pile" / "black.png")
    change(tmp_path, photos)
    best = torch.load(teacher, weights_only=True)
    torch.save({**best, "classes": ["bar", "cat", "sky"]}, tmp_path / "other.pth")
    places = {"OTHER": str(tmp_path / "other.pth"), "PHOTOS": str(photos)}
    base = [str(photos), "--unlabelled", str(tmp_path / "pile"), "--output", str(tmp_path / "semi")]
    assert main([*base, *(places.get(word, word) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("semi_supervised.py: ")
    assert not (tmp_path / "semi").exists()
