"""The checkpoints of the last epochs, kept beside last.pth."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from classification.errors import UserError


def keep_last(folder: Path, epochs: int, number: int) -> None:
    """Keep last.pth as epochNNNN.pth too, NNNN being the number of epochs that are done, and remove older such files.

    The file is a hard link, if the file system has links, so it needs no space while last.pth is the same. Files of
    later epochs, which exist if the run was resumed from an earlier one, are removed.

    Args:
        folder: the run folder.
        epochs: number of epochs that are done.
        number: how many files are kept; with 0, nothing is written or removed.

    Raises:
        UserError: the disk is full.
    """
    if not number:
        return
    last, beside = folder / "last.pth", folder / "epoch.pth.new"
    try:
        beside.unlink(missing_ok=True)
        try:
            os.link(last, beside)
        except OSError:  # a file system without links
            shutil.copyfile(last, beside)
        beside.replace(folder / f"epoch{epochs:04d}.pth")
    except OSError as error:
        raise UserError(
            f"{folder}/epoch{epochs:04d}.pth cannot be written ({error.strerror}): make room, or lower "
            "--keep-checkpoints; last.pth is complete"
        ) from error
    files = {int(path.stem.removeprefix("epoch")): path for path in folder.glob("epoch[0-9]*.pth")}
    for done, path in files.items():
        if not epochs - number < done <= epochs:
            path.unlink()
