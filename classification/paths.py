"""Questions about paths that a user gave; where a name is too long, or a folder closed, the answer is no."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def is_file(path: str | Path) -> bool:
    """Return whether there is such a file; links are followed."""
    with contextlib.suppress(OSError, ValueError):
        return Path(path).is_file()
    return False


def is_folder(path: str | Path) -> bool:
    """Return whether there is such a folder; links are followed."""
    with contextlib.suppress(OSError, ValueError):
        return Path(path).is_dir()
    return False


def weights_of(path: Path) -> Path:
    """Return the best.pth of a run folder; anything else as it is."""
    return path / "best.pth" if is_folder(path) and is_file(path / "best.pth") else path


def exists(path: str | Path) -> bool:
    """Return whether there is anything of that name."""
    with contextlib.suppress(OSError, ValueError):
        return Path(path).exists()
    return False


def relative(path: str, root: str | Path) -> str:
    """Return `os.path.relpath(path, root)`; in a tenth of the time for a file listed under `root`."""
    start = f"{str(root).rstrip(os.sep)}{os.sep}"
    rest = path.removeprefix(start)
    plain = path.startswith(start) and not rest.startswith((".", "/")) and "/." not in rest and "//" not in rest
    return rest if plain and os.sep == "/" and rest.strip("/") == rest != "" else os.path.relpath(path, root)
