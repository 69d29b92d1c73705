"""The checkpoints of the last epochs, kept beside last.pth."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from classification.errors import UserError


def keep_last(folder: Path, epochs: int, number: int) -> None:
    """Keep last.pth under the number of epochs done as well, and remove the oldest of such files.

    It is a hard link to the same file, if the file system has links, so it costs nothing. Files of later epochs
    are those of a run that was resumed from an earlier one, and are removed too.

    Args:
        folder: the run folder.
        epochs: that are done.
        number: how many are kept; with 0 nothing is kept or removed.

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
    found = {int(path.stem.removeprefix("epoch")): path for path in folder.glob("epoch[0-9]*.pth")}
    for done, path in found.items():
        if not epochs - number < done <= epochs:
            path.unlink()
