"""Photographs as they lie on a disk become small copies, split for training."""

from __future__ import annotations

import csv
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from classification.data.copies import name_copies, open_partial_folder, write_copies
from classification.data.folders import read_folder
from classification.data.split import Shares, find_split
from classification.errors import UserError
from classification.prepare import build_parser, check, main
from classification.prepare import prepare as copy_photographs


def prepare(*words: object) -> None:
    """Do what the script does, and let its errors pass."""
    typed = [str(word) for word in words]
    args = build_parser().parse_args(typed)
    check(args, typed)
    copy_photographs(args)


def write(path: Path, size: tuple[int, int] = (40, 30), turned: bool = False, colour: int | None = None) -> None:
    """Write an image of one colour, by default one that its path alone has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    value = zlib.crc32(str(path).encode()) % 2**24 if colour is None else colour
    Image.new("RGB", size, (value >> 16, value >> 8 & 255, value & 255)).save(path, exif=exif)


def sides(folder: Path) -> dict[str, str]:
    """Return train, valid or test by the first letters of an image's name."""
    return {path.name.rpartition("-")[0]: path.parts[-3] for path in folder.glob("*/*/*")}


def test_class_folders_are_split_and_shrunk_upright(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(10):
        write(tmp_path / "from" / "cat" / f"day{number % 2}" / "a.jpg", (90, 60), turned=True)
        write(tmp_path / "from" / "cat" / f"{number}.JPG", (90, 60), turned=True)
        write(tmp_path / "from" / "dog" / f"{number}.png", (24, 20))
    (tmp_path / "from" / "cat" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "from" / "cat" / "film.mov").write_bytes(b"")
    write(tmp_path / "from" / ".thumbnails" / "a.jpg")
    prepare(tmp_path / "from", tmp_path / "to", "--side", "30", "--valid", "0.2")
    said = capsys.readouterr().out
    assert "broken.jpg cannot be read" in said and "left out 1 file not named like images: 1 .mov" in said
    found = read_folder(tmp_path / "to")
    assert found.classes == ["cat", "dog"]
    assert len(found.train) + len(found.valid) == 12 + 10
    assert sum(label == 1 for _, label in found.valid) == 2
    assert {Image.open(path).size for path, label in found.train if label == 0} == {(30, 45)}
    assert {Image.open(path).size for path, label in found.train if label == 1} == {(24, 20)}
    prepare(tmp_path / "from", tmp_path / "again", "--side", "30", "--valid", "0.2")
    names = [
        sorted(str(p.relative_to(top)) for p in top.glob("*/*/*")) for top in (tmp_path / "to", tmp_path / "again")
    ]
    assert names[0] == names[1]


def test_a_split_that_is_there_stays(tmp_path: Path) -> None:
    for split, number in (("train", 3), ("val", 2)):
        for n in range(number):
            write(tmp_path / "from" / split / "cat" / f"{split}{n}.jpg")
            write(tmp_path / "from" / split / "dog" / f"{split}{n}.jpg")
    prepare(tmp_path / "from", tmp_path / "to")
    found = read_folder(tmp_path / "to")
    assert all("train" in Path(path).name for path, _ in found.train) and len(found.train) == 6
    assert all("val" in Path(path).name for path, _ in found.valid) and len(found.valid) == 4


def test_mistakes_are_said_before_anything_is_written(tmp_path: Path) -> None:
    write(tmp_path / "one" / "cat" / "a.jpg")
    write(tmp_path / "above" / "one" / "cat" / "a.jpg")
    write(tmp_path / "above" / "one" / "dog" / "a.jpg")
    for split in ("train", "test"):
        write(tmp_path / "tested" / split / "cat" / "a.jpg")
        write(tmp_path / "tested" / split / "dog" / "a.jpg")
    write(tmp_path / "alone" / "train" / "cat" / "a.jpg")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    for words, message in [
        (("nowhere", "to"), "nowhere does not exist: give a folder with one folder of photographs per class"),
        (("empty", "to"), "has no images"),
        (("above", "to"), "has images of one alone: give the folder that contains the CLASS folders"),
        (("one", "to"), "class cat has one image"),
        (("alone", "to"), "has train, but not both train and valid"),
        (("tested", "to"), "has test and train, but not both train and valid"),
        (("one", "taken"), "exists already"),
        (("one", "to", "--valid", "2"), "expected a number at least 0, at most 0.95"),
        (("one", "to", "--valid", "0.6", "--test", "0.5"), "leave nothing to train on"),
        (("one", "to", "--minutes", "3"), "--minutes has no effect"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(tmp_path / words[0], tmp_path / words[1], *words[2:])
        assert not (tmp_path / "to").exists()


def test_hidden_folders_are_no_data_and_copies_stay_on_one_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = tmp_path / "from"
    for number in range(10):
        write(top / "cat" / f"cat{number}.png", colour=number)
        write(top / "cat" / f"copy{number}.png", colour=number)
        write(top / "dog" / f"dog{number}.png", colour=100 + number)
        write(top / "dog" / "deep" / ".thumbs" / f"thumb{number}.png", colour=100 + number)
        write(top / "cat" / "@eaDir" / f"small{number}.png", colour=number)
        (top / "cat" / f"._cat{number}.png").write_bytes(b"\0\5\x16\7")
    write(top / "dog" / "deep" / "stray.png", colour=3)  # a cat
    write(top / ".ipynb_checkpoints" / "a.png")
    write(top / "loose.png")
    prepare(top, tmp_path / "to", "--valid", "0.3")
    said = capsys.readouterr().out
    assert f"left out 13 hidden files and folders, for example {top}/.ipynb_checkpoints" in said
    assert f"left out 1 image outside the class folders, for example {top}/loose.png" in said
    assert "21 files with only 10 images, byte for byte" in said and "1 image in more than one class" in said
    placed = sides(tmp_path / "to")
    assert len(placed) == 31
    assert all(placed[f"cat{number}"] == placed[f"copy{number}"] for number in range(10))
    assert placed["cat3"] == placed["stray"]
    cats = [placed[f"cat{number}"] for number in range(10)]
    assert cats.count("valid") == 3  # 0.3 of 10 images
    dogs = [placed[f"dog{number}"] for number in range(10)] + [placed["stray"]]
    assert dogs.count("valid") == 3  # 0.3 of 11 images


def test_images_of_two_classes_count_towards_the_part_of_each(tmp_path: Path) -> None:
    for number in range(10):
        for name in ("cat", "dog"):
            write(tmp_path / "from" / name / f"{name}{number}.png", colour=number)
        write(tmp_path / "from" / "dog" / f"more{number}.png", colour=10 + number)
    prepare(tmp_path / "from", tmp_path / "to", "--valid", "0.3")
    valid = [name for name, side in sides(tmp_path / "to").items() if side == "valid"]
    assert [sum(name.startswith(start) for name in valid) for start in ("cat", "dog", "more")] == [3, 3, 3]


def test_an_image_on_both_sides_of_a_split_that_is_there_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = tmp_path / "from"
    for split in ("train", "val", "test"):
        write(top / split / "cat" / f"{split}1.jpg")
        write(top / split / "dog" / f"{split}2.jpg")
    write(top / "train" / "cat" / "more.jpg")
    shutil.copy(top / "train" / "cat" / "train1.jpg", top / "val" / "dog" / "same.jpg")
    prepare(top, tmp_path / "to")
    said = capsys.readouterr().out
    pair = f"for example {top}/train/cat/train1.jpg = {top}/val/dog/same.jpg"
    assert f"warning: 1 image of train in valid or test too, byte for byte, {pair}" in said
    with pytest.raises(UserError, match=r"--test has no effect: .* is split already"):
        prepare(top, tmp_path / "other", "--test", "0.1")
    assert len(sides(tmp_path / "to")) == 8  # test, whose folders are classes, comes along
    prepare(top, tmp_path / "removed", "--remove-duplicates")
    assert "left out 1 image of train in valid or test too" in capsys.readouterr().out
    assert "train1" not in sides(tmp_path / "removed") and len(sides(tmp_path / "removed")) == 7


def test_a_class_that_would_vanish_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = tmp_path / "from"
    for number in range(2):
        write(top / "cat" / f"{number}.jpg")
        write(top / "fox" / f"{number}.jpg", colour=1)
    (top / "dog").mkdir()
    with pytest.raises(UserError, match="dog has no images: remove it"):
        prepare(top, tmp_path / "to")
    for name in ("a.MOV", "b.mov", "c.txt", "d"):
        (top / "dog" / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"dog has no images but 2 \.mov, 1 \.txt, 1 without a suffix: remove it"):
        prepare(top, tmp_path / "to")
    shutil.rmtree(top / "dog")
    with pytest.raises(UserError, match="class fox has copies of one image"):
        prepare(top, tmp_path / "to")
    shutil.rmtree(top / "fox")
    for name in ("0.jpg", "1.jpg"):
        (top / "fox").mkdir(exist_ok=True)
        shutil.copy(top / "cat" / name, top / "fox")
    write(top / "cat" / "2.jpg")
    write(top / "fox" / "3.HEIC.jpg")
    (top / "fox" / "3.HEIC.jpg").rename(top / "fox" / "3.HEIC")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"1 image in HEIC format, for example .*3\.HEIC: `pip install pillow-heif`"):
        prepare(top, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_class_of_another_class_s_images_is_refused_where_a_side_is_left_empty(tmp_path: Path) -> None:
    for number in range(2):
        for name in ("cat", "dog"):
            write(tmp_path / "from" / name / f"{name}{number}.png", colour=number)
    for number in range(2, 9):
        write(tmp_path / "from" / "cat" / f"cat{number}.png", colour=number)
    with pytest.raises(
        UserError, match="class dog shares too many of its images with other classes: none is left for valid"
    ):
        prepare(tmp_path / "from", tmp_path / "to")
    write(tmp_path / "from" / "dog" / "dog2.png", colour=50)
    prepare(tmp_path / "from", tmp_path / "to")
    placed = sides(tmp_path / "to")
    assert (placed["cat0"], placed["cat1"], placed["dog2"]) == ("train", "train", "valid")


def test_a_class_without_a_readable_image_and_a_folder_in_the_source_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("a", "b"):
        for number in range(2):
            write(source / name / f"{number}.jpg", colour=60 * number + ord(name))
    with pytest.raises(UserError, match="where it would count as a class"):
        prepare(source, source / "out")
    with pytest.raises(UserError, match="2 images outside CLASS folders, and no CLASS folder with images"):
        prepare(source / "a", tmp_path / "out")
    for number in range(2):
        (source / "b" / f"{number}.jpg").write_bytes(b"no image %d" % number)
    with pytest.raises(UserError, match="no image of b that was drawn for train can be read"):
        prepare(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(source / "b")
    for part, names in (("train", "a"), ("valid", "ac")):
        for name in names:
            write(source / part / name / "0.jpg", colour=ord(name))
    shutil.rmtree(source / "a")
    with pytest.raises(UserError, match=r"valid has classes that .*train lacks \(c\): remove"):
        prepare(source, tmp_path / "out")


def noise(path: Path, seed: int, size: tuple[int, int] = (64, 48), taken: str = "", quality: int = 95) -> None:
    """Write an image that no other looks like."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if taken:
        exif.get_ifd(0x8769)[0x9003] = taken
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, exif=exif, quality=quality)


def test_three_sides_and_a_manifest_that_names_every_original(tmp_path: Path) -> None:
    top = tmp_path / "from"
    for name in ("cat", "dog"):
        for number in range(20):
            write(top / name / f"{name}{number}.png")
    prepare(top, tmp_path / "to", "--valid", "0.1", "--test", "0.2")
    placed = list(sides(tmp_path / "to").values())
    assert {side: placed.count(side) for side in ("train", "valid", "test")} == {"train": 28, "valid": 4, "test": 8}
    rows = list(csv.DictReader((tmp_path / "to" / "manifest.csv").open()))
    assert len(rows) == 40
    for row in rows:
        copy, original = tmp_path / "to" / row["copy"], Path(row["original"])
        assert copy.parts[-3:-1] == (row["split"], row["class"]) and original.parent.name == row["class"]
        assert np.abs(np.array(Image.open(copy)).astype(int) - np.array(Image.open(original))).max() <= 4


def test_a_subfolder_stays_on_one_side(tmp_path: Path) -> None:
    top = tmp_path / "from"
    for name in ("cat", "dog"):
        for day in range(6):
            for number in range(4):
                write(top / name / f"day{day}" / f"{name}{day}x{number}.png")
    prepare(top, tmp_path / "to", "--valid", "0.2", "--test", "0.2", "--group", "folder")
    placed = sides(tmp_path / "to")
    for name in ("cat", "dog"):
        days = [{placed[f"{name}{day}x{number}"] for number in range(4)} for day in range(6)]
        assert all(len(day) == 1 for day in days)
        assert sorted(next(iter(day)) for day in days) == ["test", "train", "train", "train", "train", "valid"]


def test_shots_of_one_series_stay_on_one_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = tmp_path / "from"
    for name in ("cat", "dog"):
        for series in range(5):
            for shot in range(3):  # three minutes apart, the series an hour
                noise(
                    top / name / f"{name}{series}x{shot}.jpg",
                    100 * (name == "cat") + 10 * series + shot,
                    taken=f"2024:05:01 {8 + series:02}:{3 * shot:02}:00",
                )
    write(top / "cat" / "undated.png")
    prepare(top, tmp_path / "to", "--valid", "0.2", "--group", "time")
    assert "1 image without a date" in capsys.readouterr().out
    placed = sides(tmp_path / "to")
    for name in ("cat", "dog"):
        assert all(len({placed[f"{name}{series}x{shot}"] for shot in range(3)}) == 1 for series in range(5))
    with pytest.raises(
        UserError, match=r"class cat has 2 groups of images, but needs one to train and one to validate"
    ):
        prepare(top, tmp_path / "test", "--test", "0.1", "--group", "time", "--minutes", "1000")


def test_near_duplicates_across_the_split_are_found_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("imagehash")
    top = tmp_path / "from"
    for part, start in (("train", 0), ("valid", 100)):
        for name in ("cat", "dog"):
            for number in range(4):
                noise(top / part / name / f"{part}-{name}{number}.png", start + number + 50 * (name == "dog"))
    noise(top / "train" / "cat" / "smaller.jpg", 152, (40, 30), quality=60)  # valid's dog 2, smaller and lossy
    prepare(top, tmp_path / "to", "--near", "4")
    pair = f"{top}/train/cat/smaller.jpg = {top}/valid/dog/valid-dog2.png"
    found = f"1 image of train near to one of valid or test, for example {pair}"
    assert f"warning: {found}" in capsys.readouterr().out
    assert len(list((tmp_path / "to").glob("train/*/*"))) == 9
    prepare(top, tmp_path / "less", "--near", "4", "--remove-duplicates")
    assert f"left out {found}" in capsys.readouterr().out
    assert len(list((tmp_path / "less").glob("train/*/*"))) == 8
    assert "smaller" not in (tmp_path / "less" / "manifest.csv").read_text()


def test_what_was_cut_is_resumed_and_the_source_stays(tmp_path: Path) -> None:
    top = tmp_path / "from"
    for name in ("cat", "dog"):
        for number in range(4):
            write(top / name / f"{number}.png")
    before = {path: path.stat().st_mtime_ns for path in top.rglob("*")}
    split = find_split(top, Shares())
    copies = name_copies(split)
    part = open_partial_folder(tmp_path / "to", copies, 256)
    write_copies(copies[:5], part, 256)  # as far as the cut run came
    kept = {path.name: path.stat().st_ino for path in part.rglob("*.jpg")}
    prepare(top, tmp_path / "to")
    made = {path.name: path.stat().st_ino for path in (tmp_path / "to").rglob("*.jpg")}
    assert len(kept) == 5 and len(made) == 8 and kept.items() <= made.items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from", "to"]
    assert {path: path.stat().st_mtime_ns for path in top.rglob("*")} == before
    open_partial_folder(tmp_path / "again", copies, 256)
    (tmp_path / ".again.part" / "stale.jpg").touch()
    write(top / "dog" / "new.png")
    prepare(top, tmp_path / "again")  # another plan: begins anew
    assert not list((tmp_path / "again").glob("stale*"))


@pytest.mark.parametrize("suffix", [".heic", ".gif", ".avif", ".webp"])
def test_kinds_of_photographs(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if suffix == ".heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    if suffix == ".avif" and "avif" not in features.get_supported_modules():
        pytest.skip("this Pillow has no AVIF")
    for name in ("cat", "dog"):
        for number in range(2):
            noise(tmp_path / "from" / name / f"{number}{suffix}", number + 10 * (name == "cat"))
    prepare(tmp_path / "from", tmp_path / "to")
    said = capsys.readouterr().out
    assert f"made of 4 {suffix}" in said and "train: 2 images of 2 classes" in said
    assert "cat         1       1" in said
    assert len(list((tmp_path / "to").glob("*/*/*.jpg"))) == 4


def test_the_script_says_a_mistake_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "to")]) == 2
    assert (
        capsys.readouterr().err
        == f"prepare.py: {tmp_path}/nowhere does not exist: give a folder with one folder of photographs per class\n"
    )
    assert main([str(tmp_path), str(tmp_path / "to"), "--vald", "0.2"]) == 2
    assert "--vald" in (said := capsys.readouterr().err) and "close ones are --valid" in said
    assert main(["--help"]) == 0
