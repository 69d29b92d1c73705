"""Check that the packages of the extra [pile] are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from classification.errors import UserError

MODULES = {"pyarrow": "pyarrow", "duckdb": "duckdb>=2.0.1", "imagehash": "ImageHash"}


def check_packages(names: Sequence[str], command: str) -> None:
    """Check that the packages that a command needs are installed.

    Args:
        names: of the modules, keys of `MODULES`.
        command: for the message.

    Raises:
        UserError: some are missing; the message says what to install.
    """
    missing = [MODULES[name] for name in names if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(f"'{name}'" for name in missing)
        raise UserError(f"{command} needs {packages}: `pip install {packages}`, or the extra [pile] of this project")
