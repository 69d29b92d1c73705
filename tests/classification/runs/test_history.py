from __future__ import annotations

from pathlib import Path

import pytest

from classification.errors import UserError
from classification.runs.history import keep_last


def write(folder: Path, text: str) -> None:
    """As a checkpoint is written: a new file in the place of the old one."""
    (folder / "new").write_text(text)
    (folder / "new").replace(folder / "last.pth")


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for epochs in range(1, 6):
        write(tmp_path, f"{epochs}")
        keep_last(tmp_path, epochs, 3)
    assert {path.name: path.read_text() for path in tmp_path.glob("epoch*")} == {
        "epoch0003.pth": "3",
        "epoch0004.pth": "4",
        "epoch0005.pth": "5",
    }
    write(tmp_path, "4 again")  # a run that was resumed from its third epoch
    keep_last(tmp_path, 4, 3)
    assert {path.stem: path.read_text() for path in tmp_path.glob("epoch*")} == {
        "epoch0003": "3",
        "epoch0004": "4 again",
    }
    keep_last(tmp_path, 5, 0)
    assert len(list(tmp_path.glob("epoch*"))) == 2


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "epoch.pth.new").mkdir()  # stands in for a full disk
    with pytest.raises(UserError, match=r"epoch0001.pth cannot be written .*: make room, or lower --keep-checkpoints"):
        keep_last(tmp_path, 1, 3)
