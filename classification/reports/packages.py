"""Check that the packages of the extra [report] are installed."""

from __future__ import annotations

import importlib.util

from classification.errors import UserError

NEEDED = {"jinja2": "Jinja2", "vl_convert": "vl-convert-python"}  # module: package


def check_packages() -> None:
    """Check that the packages for a page are installed.

    Raises:
        UserError: some are missing; the message says what to install.
    """
    missing = " ".join(package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None)
    if missing:
        raise UserError(f"a report needs {missing}: `pip install {missing}`, or the extra [report] of this project")
