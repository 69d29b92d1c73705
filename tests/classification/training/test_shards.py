"""Training and scoring on tar shards: the same numbers as on the same images in folders."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from classification import main_base, predict, pseudo_label
from classification.data.folders import read_folder
from classification.data.loading import Photos, TrainBatches, make_loader
from classification.data.preprocessing import Preprocessing
from classification.data.trial import read_trial
from classification.training.trainer import Trainer
from tests.classification.conftest import CLASSES, SMALL, STUDENT
from tests.classification.seams import before_forward, run_trainer


@pytest.fixture(scope="module")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs, those of train in two shards in the same order."""
    root = tmp_path_factory.mktemp("shards")
    (root / "train").mkdir()
    (root / "valid").symlink_to(photos / "valid")
    samples = read_folder(photos).train
    for number, part in enumerate((samples[:11], samples[11:])):
        with tarfile.open(root / "train" / f"{number:06d}.tar", "w") as tar:
            for path, label in part:
                name = f"{Path(path).parent.name}{Path(path).stem}"
                for kind, content in (("png", Path(path).read_bytes()), ("cls", b"%d" % label)):
                    info = tarfile.TarInfo(f"{name}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root


def words(data: Path, output: Path, *more: str) -> list[str]:
    return [str(data), "-a", STUDENT, *SMALL, "--epochs", "2", "--output", str(output), *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "last.pth", weights_only=True)["state_dict"]
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_shards_train_as_folders_do_and_resume_within_a_shard(photos: Path, shards: Path, tmp_path: Path) -> None:
    assert main_base.main(words(photos, tmp_path / "folders")) == 0
    assert main_base.main(words(shards, tmp_path / "shards")) == 0
    best = torch.load(tmp_path / "shards" / "best.pth", weights_only=True)
    assert best["classes"] == list(CLASSES)
    assert same(weights(tmp_path / "folders"), weights(tmp_path / "shards"))

    def stop(trainer: Trainer) -> None:
        def signal(number: int, _: torch.Tensor) -> None:
            if number == 6:
                assert trainer.engine.interrupt is not None
                trainer.engine.interrupt.signal = 15

        before_forward(trainer.job, signal)

    assert run_trainer(words(shards, tmp_path / "cut"), stop, main_base) == 143
    state = torch.load(tmp_path / "cut" / "last.pth", weights_only=True)["resume"]
    assert (state["epoch"], state["step"]) == (1, 2)
    assert main_base.main(["--resume", str(tmp_path / "cut")]) == 0
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "shards"))


def test_a_shard_that_is_cut_is_named_before_work(shards: Path, tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    (data / "valid").symlink_to(shards / "valid")
    for path in (shards / "train").iterdir():
        (data / "train" / path.name).write_bytes(path.read_bytes())
    file = data / "train" / "000001.tar"
    file.write_bytes(file.read_bytes()[:3000])
    assert main_base.main(words(data, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert f"shard {file} is truncated: " in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_ranks_read_different_images_of_a_shard(shards: Path) -> None:
    samples = read_folder(shards).train
    photos = Photos(samples, Preprocessing.of(16, "pad").transform())
    parts = []
    for rank in range(2):  # scripts/check_shards.py does it with two processes
        batches = TrainBatches(len(photos), 8, 0, rank, 2)
        parts.append([int(i) for _, _, index in make_loader(photos, batches, 0, torch.device("cpu")) for i in index])
    assert sorted(parts[0] + parts[1]) == list(range(27)) and len(parts[0]) == 15  # 4 + 4 + 4 + 3


def test_shards_are_scored_selected_and_trained_on(
    photos: Path, shards: Path, teacher: Path, tmp_path: Path, capsys: Any
) -> None:
    import pyarrow.parquet as pq

    small = ["-j", "0", "-b", "4", "--shard-size", "6"]
    tars = sorted(map(str, (shards / "train").iterdir()))
    for name, paths in (("tars", tars), ("folder", [str(photos / "train")])):
        assert pseudo_label.main(["score", str(teacher), *paths, "--output", str(tmp_path / name), *small]) == 0
    found = [
        [row for file in sorted((tmp_path / name).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
        for name in ("tars", "folder")
    ]
    for one, other in zip(*found, strict=True):
        assert {**one, "path": "", "path_hash": 0} == {**other, "path": "", "path_hash": 0}
    file = tmp_path / "list"
    select = ["select", str(tmp_path / "tars"), "--top-k", "4", "--top-p", "1", "--root", str(shards / "train")]
    assert pseudo_label.main([*select, "--output", str(file), "--exclude", str(photos / "valid")]) == 0
    assert all(line.startswith(("000000.tar@", "000001.tar@")) for line in file.read_text().splitlines())
    lists = ["--pile-list", str(file), "--pile-root", str(shards / "train"), "--labels", "pseudo", "--epochs", "1"]
    assert main_base.main(words(shards, tmp_path / "run", *lists)) == 0
    capsys.readouterr()
    assert predict.main([str(tmp_path / "run" / "best.pth"), tars[0], "--csv", str(tmp_path / "csv"), "-j", "0"]) == 0
    assert (tmp_path / "csv").read_text().count("000000.tar@") == 11 * len(CLASSES)


def test_an_image_of_gigapixels_in_a_shard_is_left_out_by_name(
    photos: Path, teacher: Path, tmp_path: Path, capsys: Any
) -> None:
    good = (photos / "train" / "bar" / "0.png").read_bytes()
    head = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = good[:12] + head + struct.pack(">I", zlib.crc32(head)) + good[33:]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("0.png", good), ("bomb.png", bomb), ("1.png", good)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    words = ["score", str(teacher), str(tmp_path / "a.tar"), "--output", str(tmp_path / "scores"), "-j", "0"]
    assert pseudo_label.main(words) == 0
    said = capsys.readouterr()
    assert "bomb.png is left out (Image size (3600000000 pixels) exceeds limit" in said.err
    assert "2 images scored" in said.out and "1 images left out" in said.out


def test_an_export_calibrates_on_shards(shards: Path) -> None:
    trial = read_trial(shards, Preprocessing.of(16, "pad"), list(CLASSES), 3, calibrate=True)
    assert len(trial.data.train) == 27 and len(trial.data.valid) == 15
    assert sum(len(images) for images in trial.calibration(20, 8)) == 20


def test_both_splits_may_be_shards(shards: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "train").symlink_to(shards / "train")
    (tmp_path / "valid").symlink_to(shards / "train")
    assert main_base.main(words(tmp_path, tmp_path / "run", "--epochs", "1")) == 0
    out = capsys.readouterr().out
    assert "27 images both in train and in valid" in out
    assert torch.load(tmp_path / "run" / "best.pth", weights_only=True)["classes"] == ["0", "1", "2"]
    (said,) = [line for line in out.splitlines() if "to evaluate the best" in line]
    assert main_base.main(said.partition("main_base.py ")[2].split()) == 0
