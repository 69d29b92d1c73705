"""The images without labels of the quality tables."""

from __future__ import annotations

import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of three images of each of two classes; the order names two of them."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    order = tmp_path / "order.txt"
    order.write_text("cat 0001 0000\ndog 0002 0000\n")
    import prepare_pile

    monkeypatch.setattr(prepare_pile, "ORDER", order)
    path = tmp_path / "cifar10.tar"
    with tarfile.open(path, "w") as tar:
        for label, red in (("cat", 0), ("dog", 200)):
            for number in range(3):
                stream = BytesIO()
                Image.new("RGB", (32, 32), (red, 80 * number, 0)).save(stream, "PNG")
                member = tarfile.TarInfo(f"cifar10/train/{label}/{number:04}.jpg")
                member.size = len(stream.getvalue())
                tar.addfile(member, BytesIO(stream.getvalue()))
    return path


def colours(folder: Path) -> set[tuple[int, ...]]:
    return {Image.open(path).convert("RGB").getpixel((0, 0)) for path in folder.iterdir()}  # type: ignore[misc]


def test_the_pile_is_what_is_not_labelled(archive: Path, tmp_path: Path) -> None:
    from prepare_pile import make

    assert make(archive, tmp_path / "pile", 1) == 4
    assert colours(tmp_path / "pile") == {(0, 0, 0), (0, 160, 0), (200, 0, 0), (200, 80, 0)}
    assert not any("cat" in path.name or "dog" in path.name for path in (tmp_path / "pile").iterdir())


def test_photographs_are_labelled_or_in_the_pile_with_as_many_foreign_images(archive: Path, tmp_path: Path) -> None:
    from prepare_pile import SIDE, make

    photographs = tmp_path / "photographs"
    for number in range(6):
        path = photographs / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50, 40), (number, 0, 250)).save(path)
    (photographs / "valid" / "a").mkdir(parents=True)
    assert make(archive, tmp_path / "pile", 1, photographs, tmp_path / "few") == 8
    labelled = colours(tmp_path / "few/train/a") | colours(tmp_path / "few/train/b")
    names = sorted(path.name for path in (tmp_path / "pile").iterdir())
    own = {Image.open(tmp_path / "pile" / name).getpixel((0, 0)) for name in names if "photograph" in name}
    assert len(labelled) == 2 and labelled | own == {(number, 0, 250) for number in range(6)} and not labelled & own
    foreign = [Image.open(tmp_path / "pile" / name).size for name in names if "foreign" in name]
    assert foreign == 4 * [(SIDE, SIDE)] and (tmp_path / "few" / "valid" / "a").is_dir()


def test_labelled_belongs_to_photographs(monkeypatch: pytest.MonkeyPatch, archive: Path) -> None:
    from prepare_pile import main

    monkeypatch.setattr(sys, "argv", ["prepare_pile.py", str(archive), "pile", "--per-class", "1", "--labelled", "few"])
    with pytest.raises(SystemExit, match="2"):
        main()
