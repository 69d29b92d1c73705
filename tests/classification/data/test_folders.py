from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import pil_loader

from classification import main_base
from classification.data.cache import Cache
from classification.data.folders import DataFolder, check_heif, find_shared_images, read_folder
from classification.data.image_files import LeftOut, find_images, identical_groups
from classification.data.images import read_image
from classification.data.loading import FixedBatches, Photos, TrainBatches, draw_subset, make_loader
from classification.data.preprocessing import Preprocessing
from classification.data.transforms import train_transform
from classification.errors import UserError
from classification.system.memory import free_bytes
from tests.classification.conftest import CLASSES, SMALL, STUDENT, write_photos

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
        ("unknown class", r"lacks \(zebra\): remove them"),
        ("empty class", "without images: aaa"),
        ("no classes", "no class folders"),
        ("no valid images", "has no images"),
    ],
)
def test_a_wrong_folder_is_refused(what: str, message: str, photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(photos, root)
    broken(root, what)
    with pytest.raises(UserError, match=message):
        read_folder(root)


def test_a_folder_of_class_folders_is_sent_to_prepare(photos: Path) -> None:
    with pytest.raises(UserError, match=f"run mgd prepare {photos / 'train'} NEW_FOLDER, and give NEW_FOLDER instead$"):
        read_folder(photos / "train")


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
    assert draw_subset(5, 9, 0, 0) == [0, 1, 2, 3, 4]
    drawn = draw_subset(100, 10, 0, 0)
    assert len(set(drawn)) == 10 and drawn == draw_subset(100, 10, 0, 0) and drawn != draw_subset(100, 10, 0, 1)


def test_augmentation_depends_on_seed_epoch_and_index_only(photos: Path) -> None:
    samples = read_folder(photos).train

    def image(seed: int, epoch: int, index: int) -> torch.Tensor:
        torch.manual_seed(torch.seed() % 1000)  # whatever the state outside is
        pixels: torch.Tensor = Photos(samples, train_transform(16, "resized"), seed)[epoch, index][0]
        return pixels

    assert torch.equal(image(0, 0, 3), image(0, 0, 3))
    assert not torch.equal(image(0, 0, 3), image(0, 1, 3))
    assert not torch.equal(image(0, 0, 3), image(1, 0, 3))


def test_loading_leaves_the_global_generator_alone(photos: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    Photos(read_folder(photos).train, train_transform(16, "resized"))[0, 0]
    assert torch.equal(torch.rand(1), expected)


def test_workers_change_nothing(photos: Path) -> None:
    found = []
    for workers in (0, 2):
        batches = TrainBatches(27, 8, seed=1)
        loading = make_loader(Photos(read_folder(photos).train, train_transform(16, "resized")), batches, workers, CPU)
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
        photo = Photos(samples, train_transform(16, "resized"), 3, cached)
        assert torch.equal(photo[1, 4][0], Photos(samples, train_transform(16, "resized"), 3)[1, 4][0])
    for index, (path, _) in enumerate(samples):
        assert np.array_equal(np.asarray(cache[index]), np.asarray(pil_loader(path)))


def test_a_cache_that_does_not_fit_is_refused(photos: Path) -> None:
    with pytest.raises(UserError, match="--cache ram needs"):
        Cache(read_folder(photos).train, read_image, free=1000)


def test_a_cache_names_the_image_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"x\.png cannot be read"):
        Cache([(str(path), 0)], read_image)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"x\.png cannot be read"):
        Photos([(str(path), 0)], Preprocessing.of(16).transform())[0, 0]


def test_names_in_capitals_and_folders_in_class_folders_count(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", train=2, valid=1)
    dot = root / "train" / "dot"
    (dot / "0.png").rename(dot / "IMG_0.PNG")
    (dot / "2020" / "may").mkdir(parents=True)
    (dot / "1.png").rename(dot / "2020" / "may" / "1.Png")
    (dot / "Thumbs.db").write_bytes(b"")
    names = [Path(path).name for path, label in read_folder(root).train if label == 1]
    assert names == ["IMG_0.PNG", "1.Png"]


JUNK_FOLDERS = (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".thumbs", "$RECYCLE.BIN", "lost+found", ".Trash-1000")
JUNK_FILES = ("._0.png", ".hidden.jpg", "Thumbs.db", "desktop.ini", ".DS_Store", "Icon\r")


def add_junk(folder: Path) -> None:
    """Put an image into every kind of hidden folder, and hidden files beside."""
    for name in (*JUNK_FOLDERS, ".AppleDouble", "@EADIR"):
        (folder / name / "deep").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / name / "a.png")
        Image.new("RGB", (16, 16)).save(folder / name / "deep" / "a.png")
    for name in JUNK_FILES:
        (folder / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(40))


@pytest.mark.parametrize("depth", ["", "dot", "dot/2020/may"])
def test_hidden_files_and_folders_are_no_data_at_any_depth(depth: str, tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", train=2, valid=1)
    before = read_folder(root), read_folder(root, labels=False)
    for split in ("train", "valid"):
        add_junk(root / split / depth)
    for found, expected in zip((read_folder(root), read_folder(root, labels=False)), before, strict=True):
        assert found == expected and len(found.notes) == 1
    # 9 folders a split, and 2 files that are called images; without a class folder those of train count by depth alone
    assert (
        read_folder(root)
        .notes[0]
        .startswith(f"left out {22 if depth else 18} hidden files and folders, for example {root}/")
    )


def test_the_data_folder_itself_may_be_hidden(tmp_path: Path) -> None:
    root = write_photos(tmp_path / ".cache" / "@eaDir", train=2, valid=1)
    assert len(read_folder(root).train) == 6 and read_folder(root).notes == []


def test_images_of_every_suffix_count_and_others_are_told(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", train=1, valid=1)
    dot = root / "train" / "dot"
    suffixes = ["jpg", "jpeg", "jpe", "jfif", "png", "gif", "webp", "avif", "bmp", "tif", "tiff", "ppm", "heic", "heif"]
    for suffix in suffixes:
        (dot / f"a.{suffix}").write_bytes(b"")
        (dot / f"B.{suffix.upper()}").write_bytes(b"")
    others = ("a.mov", "B.MOV", "c.mov", "a.txt", "b.json", "a.xml", "a.csv", "a.png.part", "a.jpg~", "README", ".jpg")
    for name in others:
        (dot / name).write_bytes(b"")
    (root / "valid" / "sky" / "more.txt").write_bytes(b"")
    Image.new("RGB", (16, 16)).save(root / "train" / "stray.png")
    found = read_folder(root)
    assert sum(label == 1 for _, label in found.train) == 2 * len(suffixes) + 1
    files, hidden, loose = found.notes
    assert files.startswith("left out 11 files not named like images: 3 .mov, 2 .txt, 1 ") and "2 others" in files
    assert hidden == f"left out 1 hidden file or folder, for example {dot}/.jpg"
    assert loose == f"left out 1 image outside the class folders, for example {root}/train/stray.png"
    found = read_folder(root, labels=False)
    assert len(found.train) == 2 * len(suffixes) + 4


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_class_that_would_vanish_is_refused_with_its_suffixes(split: str, tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", train=2, valid=2)
    (root / split / "dot" / "0.png").rename(root / split / "dot" / "0.MOV")
    assert "left out 1 file not named like images: 1 .mov" in read_folder(root).notes
    (root / split / "dot" / "1.png").rename(root / split / "dot" / "1")
    message = rf"{split} has class folders without images: dot \(1 \.mov, 1 without a suffix\); images end in \.jpg "
    with pytest.raises(UserError, match=message):
        read_folder(root)


def test_a_class_may_be_missing_in_valid_but_not_in_train(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", train=2, valid=2)
    for split in ("valid", "train"):
        (root / split / "dot" / ".thumbs").mkdir()
        for name in ("0.png", "1.png"):
            (root / split / "dot" / name).rename(root / split / "dot" / ".thumbs" / name)
        if split == "valid":
            assert len(read_folder(root).valid) == 4
    with pytest.raises(UserError, match=r"train has class folders without images: dot \(1 hidden\): add images"):
        read_folder(root)


@pytest.mark.parametrize("what", ["absent", "without classes", "other folders"])
def test_evaluation_needs_no_train_folder(what: str, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "valid", tmp_path / "valid")
    if what != "absent":
        (tmp_path / "train" / ("2021" if what == "other folders" else "")).mkdir(parents=True)
    found = read_folder(tmp_path, evaluate=True)
    assert (found.classes, len(found.valid), found.train) == (list(CLASSES), 15, [])
    with pytest.raises(UserError):
        read_folder(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone cannot be read: No such file or directory"):
        list(find_images(tmp_path / "gone", LeftOut()))


def test_heic_needs_its_library_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    check_heif(DataFolder([], [("a.jpg", 0)], [("heic.png", 0)]))
    with pytest.raises(
        UserError, match=r"2 images in HEIC format, for example b\.HEIC: `pip install pillow-heif` to read them"
    ):
        check_heif(DataFolder([], [("a.jpg", 0), ("b.HEIC", 0)], [("c.heif", 0)]))
    root = write_photos(tmp_path / "photos", train=2, valid=1)
    (root / "train" / "dot" / "a.heic").write_bytes(b"")
    assert main_base.main([str(root), "-a", STUDENT, *SMALL, "--output", str(tmp_path / "run")]) == 2
    assert "1 image in HEIC" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_an_image_in_train_and_in_valid_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def file(name: str, content: bytes) -> tuple[str, int]:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name), 0

    long = bytes(20_000)
    train = [file("a", b"one"), file("b", b"two"), file("c", long + b"x"), file("a2", b"one"), file("empty", b"")]
    apart = [file("d", b"six"), file("e", b"x" + long), file("empty2", b""), (str(tmp_path / "gone"), 0)]
    assert find_shared_images(DataFolder([], train, apart)) == []
    valid = [*apart, file("f", long + b"x"), file("g", b"one")]
    (note,) = find_shared_images(DataFolder([], train, valid))
    assert note.startswith("warning: 2 images both in train and in valid, byte for byte (")
    assert f"{tmp_path}/g = {tmp_path}/a" in note or f"{tmp_path}/f = {tmp_path}/c" in note
    assert find_shared_images(DataFolder([], train, valid), max_compared=3) == []  # more are compared by path alone
    (note,) = find_shared_images(DataFolder([], train, [*valid, train[1]]), max_compared=3)
    assert note.startswith(f"warning: 1 image both in train and in valid, byte for byte ({tmp_path}/b)")


def test_files_of_equal_size_and_equal_middle_are_read_whole(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    for name, first in zip(names, (1, 2, 1, 3), strict=True):
        (tmp_path / name).write_bytes(bytes([first]) + bytes(100_000))
    assert identical_groups([str(tmp_path / name) for name in names]) == [[str(tmp_path / "a"), str(tmp_path / "c")]]


def test_a_run_says_what_is_left_out_and_what_is_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_photos(tmp_path / "photos", train=6, valid=2)
    (root / "train" / "dot" / "a.mov").write_bytes(b"")
    shutil.copy(root / "train" / "sky" / "3.png", root / "valid" / "sky" / "7.png")
    words = [str(root), "-a", STUDENT, *SMALL, "--epochs", "1"]
    assert main_base.main([*words, "--output", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "=> left out 1 file not named like images: 1 .mov" in said
    shared = f"{root}/valid/sky/7.png = {root}/train/sky/3.png"
    assert f"=> warning: 1 image both in train and in valid, byte for byte ({shared})" in said
    assert "Err@1" not in said  # notes of the data do not have a fresh network evaluated


def test_free_memory_is_told_in_bytes() -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert whole / 500 < free_bytes() <= whole


def test_a_cache_leaves_some_memory_free(photos: Path) -> None:
    samples = read_folder(photos).train
    need = 3 * 16 * 16 * len(samples)
    with pytest.raises(UserError, match="--cache ram needs"):
        Cache(samples, read_image, free=need)
    Cache(samples, read_image, free=2 * need)
