"""Photographs as they lie on a disk become small copies, split for training."""

from __future__ import annotations

import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from classification.data.folders import read_folder

ROOT = Path(__file__).parents[1]


@pytest.fixture
def prepare() -> Callable[..., None]:
    from prepare_photos import main

    return lambda *words: main([str(word) for word in words])


def write(path: Path, size: tuple[int, int] = (40, 30), turned: bool = False, colour: int | None = None) -> None:
    """Write an image of one colour, by default one that its path alone has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    value = zlib.crc32(str(path).encode()) % 2**24 if colour is None else colour
    Image.new("RGB", size, (value >> 16, value >> 8 & 255, value & 255)).save(path, exif=exif)


def sides(folder: Path) -> dict[str, str]:
    """Return train or valid by the first letters of an image's name."""
    return {path.name.rpartition("-")[0]: path.parts[-3] for path in folder.glob("*/*/*")}


def test_class_folders_are_split_and_shrunk_upright(
    prepare: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(10):
        write(tmp_path / "from" / "cat" / f"day{number % 2}" / "a.jpg", (90, 60), turned=True)
        write(tmp_path / "from" / "cat" / f"{number}.JPG", (90, 60), turned=True)
        write(tmp_path / "from" / "dog" / f"{number}.png", (24, 20))
    (tmp_path / "from" / "cat" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "from" / "cat" / "film.mov").write_bytes(b"")
    write(tmp_path / "from" / ".thumbnails" / "a.jpg")
    prepare(tmp_path / "from", tmp_path / "to", "--side", "30", "--valid", "0.2")
    said = capsys.readouterr().out
    assert "broken.jpg cannot be read" in said and "left out 1 file not called images: 1 .mov" in said
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


def test_a_split_that_is_there_stays(prepare: Callable[..., None], tmp_path: Path) -> None:
    for split, number in (("train", 3), ("val", 2)):
        for n in range(number):
            write(tmp_path / "from" / split / "cat" / f"{split}{n}.jpg")
            write(tmp_path / "from" / split / "dog" / f"{split}{n}.jpg")
    prepare(tmp_path / "from", tmp_path / "to")
    found = read_folder(tmp_path / "to")
    assert all("train" in Path(path).name for path, _ in found.train) and len(found.train) == 6
    assert all("val" in Path(path).name for path, _ in found.valid) and len(found.valid) == 4


def test_mistakes_are_said_before_anything_is_written(prepare: Callable[..., None], tmp_path: Path) -> None:
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
        (("nowhere", "to"), "is no folder"),
        (("empty", "to"), "holds no images"),
        (("above", "to"), "holds images of one alone: give the folder that holds the CLASS folders"),
        (("one", "to"), "class cat has one image"),
        (("alone", "to"), "holds train, not train and valid"),
        (("tested", "to"), "holds test and train, not train and valid"),
        (("one", "taken"), "exists already"),
        (("one", "to", "--valid", "2"), "between 0 and 1"),
    ]:
        with pytest.raises(SystemExit, match=message):
            prepare(tmp_path / words[0], tmp_path / words[1], *words[2:])
        assert not (tmp_path / "to").exists()


def test_hidden_folders_are_no_data_and_copies_stay_on_one_side(
    prepare: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    assert f"left out 13 hidden files and folders, as {top}/.ipynb_checkpoints" in said
    assert f"left out 1 image outside the class folders, as {top}/loose.png" in said
    assert "21 files hold 10 images, byte for byte" in said and "1 image in more than one class" in said
    placed = sides(tmp_path / "to")
    assert len(placed) == 31
    assert all(placed[f"cat{number}"] == placed[f"copy{number}"] for number in range(10))
    assert placed["cat3"] == placed["stray"]
    cats = [placed[f"cat{number}"] for number in range(10)]
    assert cats.count("valid") == 3  # 0.3 of 10 images
    dogs = [placed[f"dog{number}"] for number in range(10)] + [placed["stray"]]
    assert dogs.count("valid") == 3  # 0.3 of 11 images


def test_images_of_two_classes_count_towards_the_part_of_each(prepare: Callable[..., None], tmp_path: Path) -> None:
    for number in range(10):
        for name in ("cat", "dog"):
            write(tmp_path / "from" / name / f"{name}{number}.png", colour=number)
        write(tmp_path / "from" / "dog" / f"more{number}.png", colour=10 + number)
    prepare(tmp_path / "from", tmp_path / "to", "--valid", "0.3")
    valid = [name for name, side in sides(tmp_path / "to").items() if side == "valid"]
    assert [sum(name.startswith(start) for name in valid) for start in ("cat", "dog", "more")] == [3, 3, 3]


def test_an_image_on_both_sides_of_a_split_that_is_there_is_said(
    prepare: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = tmp_path / "from"
    for split in ("train", "val", "test"):
        write(top / split / "cat" / f"{split}1.jpg")
        write(top / split / "dog" / f"{split}2.jpg")
    shutil.copy(top / "train" / "cat" / "train1.jpg", top / "val" / "dog" / "same.jpg")
    prepare(top, tmp_path / "to")
    said = capsys.readouterr().out
    assert (
        f"warning: 1 image both in train and in valid, as {top}/train/cat/train1.jpg = {top}/val/dog/same.jpg" in said
    )
    assert f"left out {top}/test" in said and len(sides(tmp_path / "to")) == 5


def test_a_class_that_would_vanish_is_refused(
    prepare: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "from"
    for number in range(2):
        write(top / "cat" / f"{number}.jpg")
        write(top / "fox" / f"{number}.jpg", colour=1)
    (top / "dog").mkdir()
    with pytest.raises(SystemExit, match="dog holds no images: remove it"):
        prepare(top, tmp_path / "to")
    for name in ("a.MOV", "b.mov", "c.txt", "d"):
        (top / "dog" / name).write_bytes(b"")
    with pytest.raises(SystemExit, match=r"dog holds no images but 2 \.mov, 1 \.txt, 1 without a suffix: remove it"):
        prepare(top, tmp_path / "to")
    shutil.rmtree(top / "dog")
    with pytest.raises(SystemExit, match="class fox has copies of one image"):
        prepare(top, tmp_path / "to")
    shutil.rmtree(top / "fox")
    for name in ("0.jpg", "1.jpg"):
        (top / "fox").mkdir(exist_ok=True)
        shutil.copy(top / "cat" / name, top / "fox")
    write(top / "cat" / "2.jpg")
    write(top / "fox" / "3.HEIC.jpg")
    (top / "fox" / "3.HEIC.jpg").rename(top / "fox" / "3.HEIC")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    with pytest.raises(SystemExit, match=r"1 image in HEIC, as .*3\.HEIC: `pip install pillow-heif`"):
        prepare(top, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_class_of_another_class_s_images_is_refused_where_a_side_is_left_empty(
    prepare: Callable[..., None], tmp_path: Path
) -> None:
    for number in range(2):
        for name in ("cat", "dog"):
            write(tmp_path / "from" / name / f"{name}{number}.png", colour=number)
    for number in range(2, 9):
        write(tmp_path / "from" / "cat" / f"cat{number}.png", colour=number)
    with pytest.raises(
        SystemExit, match="class dog has too few images that no other class has: none is left for valid"
    ):
        prepare(tmp_path / "from", tmp_path / "to")
    write(tmp_path / "from" / "dog" / "dog2.png", colour=50)
    prepare(tmp_path / "from", tmp_path / "to")
    placed = sides(tmp_path / "to")
    assert (placed["cat0"], placed["cat1"], placed["dog2"]) == ("train", "train", "valid")


def test_a_class_without_a_readable_image_and_a_folder_in_the_source_are_refused(
    prepare: Callable[..., None], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    for name in ("a", "b"):
        for number in range(2):
            write(source / name / f"{number}.jpg", colour=60 * number + ord(name))
    with pytest.raises(SystemExit, match="where it would count as a class"):
        prepare(source, source / "out")
    with pytest.raises(SystemExit, match="2 images beside its folders, and no CLASS folders"):
        prepare(source / "a", tmp_path / "out")
    for number in range(2):
        (source / "b" / f"{number}.jpg").write_bytes(b"no image %d" % number)
    with pytest.raises(SystemExit, match="no image of b that was drawn for train can be read"):
        prepare(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(source / "b")
    for part, names in (("train", "a"), ("valid", "ac")):
        for name in names:
            write(source / part / name / "0.jpg", colour=ord(name))
    shutil.rmtree(source / "a")
    with pytest.raises(SystemExit, match=r"valid has classes that .*train lacks: c"):
        prepare(source, tmp_path / "out")
