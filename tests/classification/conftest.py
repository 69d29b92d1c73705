"""A small folder of photographs and a teacher for it, made by the tests themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from classification import main_base, main_mgd

CLASSES = ("bar", "dot", "sky")
TEACHER = "cifar_resnet8"
STUDENT = "cifar_resnet8_w0.5"
SMALL = ["--img-size", "16", "-b", "8", "-j", "0", "--seed", "0", "--train-crop", "pad", "--lr", "0.05", "-p", "1"]


def picture(label: int, rng: np.random.Generator) -> Image.Image:
    pixels = rng.integers(0, 60, (16, 16, 3))
    where = rng.integers(2, 10)
    if label == 0:
        pixels[where : where + 4] += 150
    elif label == 1:
        pixels[where : where + 5, where : where + 5] += 150
    else:
        pixels[:8, :, 2] += 150
    return Image.fromarray(pixels.astype(np.uint8))


def write_photos(root: Path, train: int, valid: int) -> Path:
    rng = np.random.default_rng(0)
    for split, num in (("train", train), ("valid", valid)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(num):
                picture(label, rng).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), train=9, valid=5)


@pytest.fixture(scope="session")
def teacher(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best.pth of a teacher that was really trained."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    words = [str(photos), "-a", TEACHER, *SMALL, "--epochs", "5", "--output", str(folder)]
    assert main_base.main(words) == 0
    assert torch.load(folder / "best.pth", weights_only=True)["classes"] == list(CLASSES)
    return folder / "best.pth"


@pytest.fixture
def distil(photos: Path, teacher: Path, tmp_path: Path) -> list[str]:
    """The words of a short distillation, its run folder last."""
    pair = ["-a", STUDENT, "--teacher-arch", TEACHER, "--teacher-resume", str(teacher)]
    return [str(photos), *pair, *SMALL, "--loss-factor", "1e3", "--epochs", "2", "--output", str(tmp_path / "run")]


@pytest.fixture(scope="session")
def short_run(photos: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a distillation of one epoch."""
    folder = tmp_path_factory.mktemp("short") / "run"
    pair = ["-a", STUDENT, "--teacher-arch", TEACHER, "--teacher-resume", str(teacher)]
    assert main_mgd.main([str(photos), *pair, *SMALL, "--epochs", "1", "--output", str(folder)]) == 0
    return folder
