"""Choose the folder that a run writes to."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from classification.data.listing import NAME as LISTING
from classification.errors import UserError
from classification.options.groups import Run
from classification.paths import exists, is_folder
from classification.runs.checkpoint import LOCK


def run_folder(run: Run, name: str) -> Path:
    """Return the folder that this run writes to; one named by --output is made, to find errors early.

    Raises:
        UserError: it has content already, is a file, or cannot be made.
    """
    if run.resume and run.resume != "auto":
        return Path(run.resume).resolve().parent
    if not run.output:
        return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = Path(run.output)
    if _is_taken(folder, run):
        raise UserError(
            f"--output {folder} exists already and is not overwritten: give another, or --resume its last.pth"
        )
    make_output(folder)
    return folder


def make_output(folder: Path) -> None:
    """Make the folder of --output, unless it exists.

    Raises:
        UserError: it cannot be made, or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "no file may have such a name"
        raise UserError(f"--output {folder} cannot be made: {cause}") from error


def listing_place(run: Run) -> Path | None:
    """Return the folder in which a run caches the list of its images, or None for a run that writes nothing.

    It is the run folder, or `runs` if that has no name yet; None for a folder that `run_folder` will refuse.
    """
    if run.evaluate or run.calibrate or run.show_taps:
        return None
    if run.resume and run.resume != "auto":
        return Path(run.resume).resolve().parent
    if not run.output:
        return Path("runs")
    return None if _is_taken(Path(run.output), run) else Path(run.output)


def _is_taken(folder: Path, run: Run) -> bool:
    """Return whether a folder has content that this run does not resume; a lock or a list of images does not count."""
    try:
        if not exists(folder):
            return False
        resumes = run.resume == "auto" and any(exists(folder / name) for name in (LOCK, "config.json", "last.pth"))
        return not resumes and (not is_folder(folder) or any(not _is_ours(path.name) for path in folder.iterdir()))
    except OSError:
        return True


def _is_ours(name: str) -> bool:
    return name == LOCK or name.startswith(LISTING)
