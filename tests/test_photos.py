"""Photographs as they lie on a disk become small copies, split for training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from classification.data import read_folder

ROOT = Path(__file__).parents[1]


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from prepare_photos import main

    return lambda *words: main([str(word) for word in words])


def write(path: Path, size: tuple[int, int] = (40, 30), turned: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    Image.new("RGB", size, "red").save(path, exif=exif)


def test_class_folders_are_split_and_shrunk_upright(
    prepare: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(10):
        write(tmp_path / "from" / "cat" / f"day{number % 2}" / "a.jpg", (90, 60), turned=True)
        write(tmp_path / "from" / "cat" / f"{number}.JPG", (90, 60), turned=True)
        write(tmp_path / "from" / "dog" / f"{number}.png", (24, 20))
    (tmp_path / "from" / "cat" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "from" / "cat" / "phone.heic").write_bytes(b"")
    write(tmp_path / "from" / ".thumbnails" / "a.jpg")
    prepare(tmp_path / "from", tmp_path / "to", "--side", "30", "--valid", "0.2")
    said = capsys.readouterr().out
    assert "broken.jpg cannot be read" in said and "left out: 1 files of" in said
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
