"""Questions about paths that a user gave; where a name is too long, or a folder closed, the answer is no."""

from __future__ import annotations

import contextlib
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


def exists(path: str | Path) -> bool:
    """Return whether there is anything of that name."""
    with contextlib.suppress(OSError, ValueError):
        return Path(path).exists()
    return False
