from __future__ import annotations

import os
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets.folder import pil_loader

from classification.cache import Cache, _free_bytes
from classification.data import FixedBatches, Photos, TrainBatches, loader, read_folder, subset
from classification.errors import UserError
from classification.images import read_image
from classification.transforms import eval_transform, train_transform
from tests.classification.conftest import CLASSES, write_photos

ARGS = Namespace(img_size=16, train_crop="resized", hflip=1)
CPU = torch.device("cpu")


def test_folder_is_read_with_the_classes_of_train(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(photos, root)
    (root / "valid").rename(root / "val")
    shutil.rmtree(root / "val" / "bar")
    folder = read_folder(root)
    assert folder.classes == list(CLASSES)
    assert len(folder.train) == 27 and len(folder.valid) == 10
    assert {Path(path).parent.name: target for path, target in folder.valid} == {"dot": 1, "sky": 2}


def test_images_without_labels_are_found_behind_links_too(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in CLASSES:
        (tmp_path / "train" / name).symlink_to(photos / "train" / name)
    shutil.copytree(photos / "valid", tmp_path / "valid")
    assert len(read_folder(tmp_path, labels=False).train) == 27


def broken(root: Path, what: str) -> None:
    if what == "no root":
        shutil.rmtree(root)
    elif what in ("no train", "no valid"):
        shutil.rmtree(root / what.split()[1])
    elif what == "unknown class":
        (root / "valid" / "zebra").mkdir()
    elif what == "empty class":
        (root / "train" / "aaa").mkdir()
    elif what == "no classes":
        shutil.rmtree(root / "train")
        (root / "train").mkdir()
    else:
        for image in (root / "valid").rglob("*.png"):
            image.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no root", "does not exist"),
        ("no train", "no folder train/"),
        ("no valid", "no folder valid/ or val/"),
        ("unknown class", "lacks: zebra"),
        ("empty class", "without images: aaa"),
        ("no classes", "no class folders"),
        ("no valid images", "holds no images"),
    ],
)
def test_a_wrong_folder_is_refused(what: str, message: str, photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(photos, root)
    broken(root, what)
    with pytest.raises(UserError, match=message):
        read_folder(root)


@pytest.mark.parametrize(("num", "size", "ranks"), [(27, 8, 1), (27, 8, 2), (27, 8, 3), (16, 8, 2), (5, 8, 2)])
def test_ranks_share_the_same_balanced_global_batches(num: int, size: int, ranks: int) -> None:
    alone = TrainBatches(num, size, seed=3)
    parts = [TrainBatches(num, size, 3, rank, ranks) for rank in range(ranks)]
    for sampler in (alone, *parts):
        sampler.epoch = 4
    batches = list(alone)
    assert sorted(index for batch in batches for _, index in batch) == list(range(num))
    assert len(batches) == len(alone) == -(-num // size)
    assert [len(batch) for batch in batches] == [alone.batch_size(step) for step in range(len(alone))]
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    for step, pieces in enumerate(zip(*parts, strict=True)):
        assert [key for piece in pieces for key in piece] == batches[step]
    assert all(epoch == 4 for batch in batches for epoch, _ in batch)


def test_epochs_and_seeds_shuffle_anew() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = TrainBatches(50, 50, seed)
        sampler.epoch = epoch
        return [index for _, index in next(iter(sampler))]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)


def test_evaluation_counts_every_image_once() -> None:
    parts = [FixedBatches(list(range(11)), 2, rank, 3) for rank in range(3)]
    assert sorted(index for part in parts for batch in part for _, index in batch) == list(range(11))
    assert [len(part) for part in parts] == [len(list(part)) for part in parts]


def test_subset_is_drawn_by_seed_and_epoch() -> None:
    assert subset(5, 9, 0, 0) == [0, 1, 2, 3, 4]
    drawn = subset(100, 10, 0, 0)
    assert len(set(drawn)) == 10 and drawn == subset(100, 10, 0, 0) and drawn != subset(100, 10, 0, 1)


def test_augmentation_depends_on_seed_epoch_and_index_only(photos: Path) -> None:
    samples = read_folder(photos).train

    def image(seed: int, epoch: int, index: int) -> torch.Tensor:
        torch.manual_seed(torch.seed() % 1000)  # whatever the state outside is
        return Photos(samples, train_transform(ARGS), seed)[epoch, index][0]

    assert torch.equal(image(0, 0, 3), image(0, 0, 3))
    assert not torch.equal(image(0, 0, 3), image(0, 1, 3))
    assert not torch.equal(image(0, 0, 3), image(1, 0, 3))


def test_loading_leaves_the_global_generator_alone(photos: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    Photos(read_folder(photos).train, train_transform(ARGS))[0, 0]
    assert torch.equal(torch.rand(1), expected)


def test_workers_change_nothing(photos: Path) -> None:
    found = []
    for workers in (0, 2):
        batches = TrainBatches(27, 8, seed=1)
        loading = loader(Photos(read_folder(photos).train, train_transform(ARGS)), batches, workers, CPU)
        for batches.epoch in (0, 1):
            found.append([torch.cat(parts) for parts in zip(*loading, strict=True)])
    for a, b in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(found[0][0], found[1][0])


def test_a_batch_smaller_than_the_ranks_is_refused() -> None:
    for num, batch_size, ranks in ((27, 1, 2), (27, 2, 2), (9, 8, 8)):
        with pytest.raises(UserError, match="raise -b"):
            TrainBatches(num, batch_size, 0, 0, ranks)


def test_a_cache_holds_what_the_files_hold(photos: Path) -> None:
    samples = read_folder(photos).train
    cache = Cache(samples, read_image)
    for cached in (None, cache):
        photo = Photos(samples, train_transform(ARGS), 3, cached)
        assert torch.equal(photo[1, 4][0], Photos(samples, train_transform(ARGS), 3)[1, 4][0])
    for index, (path, _) in enumerate(samples):
        assert np.array_equal(np.asarray(cache[index]), np.asarray(pil_loader(path)))


def test_a_cache_that_does_not_fit_is_refused(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("classification.cache._free_bytes", lambda: 1000)
    with pytest.raises(UserError, match="--cache ram needs"):
        Cache(read_folder(photos).train, read_image)


def test_a_cache_names_the_image_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"x\.png cannot be read"):
        Cache([(str(path), 0)], read_image)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"x\.png cannot be read"):
        Photos([(str(path), 0)], eval_transform(ARGS))[0, 0]


def test_names_in_capitals_and_folders_in_class_folders_count(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", train=2, valid=1)
    dot = root / "train" / "dot"
    (dot / "0.png").rename(dot / "IMG_0.PNG")
    (dot / "2020" / "may").mkdir(parents=True)
    (dot / "1.png").rename(dot / "2020" / "may" / "1.Png")
    (dot / "Thumbs.db").write_bytes(b"")
    names = [Path(path).name for path, label in read_folder(root).train if label == 1]
    assert names == ["IMG_0.PNG", "1.Png"]


def test_free_memory_is_told_in_bytes() -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert whole / 500 < _free_bytes() <= whole


def test_a_cache_leaves_some_memory_free(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = read_folder(photos).train
    need = 3 * 16 * 16 * len(samples)
    monkeypatch.setattr("classification.cache._free_bytes", lambda: need)
    with pytest.raises(UserError, match="--cache ram needs"):
        Cache(samples, read_image)
    monkeypatch.setattr("classification.cache._free_bytes", lambda: 2 * need)
    Cache(samples, read_image)
