"""Images that are taken out of train/ to choose settings on."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for part, num in (("train", 3), ("valid", 1)):
        for label in ("hat", "shoe"):
            (tmp_path / "data" / part / label).mkdir(parents=True)
            for number in range(num):
                (tmp_path / "data" / part / label / f"{number}.jpg").write_text(f"{part} {label} {number}")
    return tmp_path / "data"


def test_training_images_are_shared_among_train_and_valid(data: Path, tmp_path: Path) -> None:
    from hold_out import hold_out

    hold_out(data, tmp_path / "new", 1)
    found = {str(path.relative_to(tmp_path / "new")): path.read_text() for path in (tmp_path / "new").rglob("*.jpg")}
    assert found == {
        "valid/hat/0.jpg": "train hat 0",
        "valid/shoe/0.jpg": "train shoe 0",
        "train/hat/1.jpg": "train hat 1",
        "train/hat/2.jpg": "train hat 2",
        "train/shoe/1.jpg": "train shoe 1",
        "train/shoe/2.jpg": "train shoe 2",
    }


def test_a_class_that_would_be_empty_is_refused_and_nothing_stays(data: Path, tmp_path: Path) -> None:
    from hold_out import hold_out

    with pytest.raises(ValueError, match="hat has 3 images: too few to hold 3 out"):
        hold_out(data, tmp_path / "new", 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
