"""The code of docs/start/huggingface.md, run on a folder of small pictures and a tiny teacher."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessor

from mgd.losses.mgd import ChannelMatching
from tests.mgd.huggingface.tiny import vit

PAGE = Path(__file__).parents[3] / "docs" / "start" / "huggingface.md"
NAMES = ["bar", "dot", "sky"]


def write_folders(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, number in (("train", 8), ("valid", 3)):
        for label, name in enumerate(NAMES):
            folder = root / "photos" / split / name
            folder.mkdir(parents=True)
            for position in range(number):
                pixels = rng.integers(0, 60, (40, 40, 3)) + 80 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{position}.png")
    ids = dict(enumerate(NAMES))
    vit(0, depth=4, id2label=ids, label2id={name: index for index, name in ids.items()}).save_pretrained(
        root / "teacher"
    )
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "teacher")


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")  # not the user's own
    plain, matched = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(plain, names)
    assert names["trainer"].state.global_step == 6
    found = names["trainer"].evaluate()
    assert {"eval_loss", "eval_accuracy", "eval_f1"} <= set(found)
    saved = AutoModelForImageClassification.from_pretrained("student/final")
    assert saved.config.id2label == dict(enumerate(NAMES))
    assert (tmp_path / "student/final/preprocessor_config.json").is_file()
    exec(matched, names)
    term = names["trainer"].distiller.terms["mgd"]
    assert isinstance(term, ChannelMatching) and len(term.flows) == 3
