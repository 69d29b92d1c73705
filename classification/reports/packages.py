"""The packages that a page is made with, which not every user of the project needs."""

from __future__ import annotations

import importlib.util

from classification.errors import UserError

NEEDED = {"jinja2": "Jinja2", "vl_convert": "vl-convert-python"}  # module: package


def check_packages() -> None:
    """Refuse to begin a page that could not be made.

    Raises:
        UserError: a package is not installed.
    """
    missing = " ".join(package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None)
    if missing:
        raise UserError(f"a report needs {missing}: `pip install {missing}`, or the extra [report] of this project")
