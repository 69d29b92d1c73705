"""Terms from a user's own file: --term-module FILE.py, where the file has TERMS = {name: term class}."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from classification.errors import UserError, quoted
from classification.options.terms import TermClasses, fields_of
from mgd.losses import LOSSES, Term

NAME = re.compile(r"[a-z][a-z0-9_]*")


def term_classes(path: str | None) -> TermClasses:
    """Return the classes of terms by name: those of the library, and of the user's file where there is one.

    The file is run as Python runs a script: it must be trusted.

    Raises:
        UserError: a file that cannot be run, or does not have such TERMS.
    """
    return LOSSES if not path else {**LOSSES, **_checked(path, _run(path))}


def digest_of(path: str) -> str:
    """Return the SHA-256 of a file, which a resumed run compares.

    Raises:
        UserError: a file that cannot be read.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"--term-module {path} cannot be read: {error.strerror}") from error


def check_digest(path: str | None, digest: str | None, run: str) -> None:
    """Refuse to resume a run with terms of a file that is not given, or not the same: no folder brings code along.

    Args:
        path: the file of this command, or None.
        digest: that the run recorded; None where its terms were those of the library.
        run: its checkpoint, for messages.

    Raises:
        UserError: naming the file.
    """
    if digest and not path:
        raise UserError(f"{run} is from a run with terms from a file: give that file again with --term-module")
    if digest and path and digest_of(path) != digest:
        raise UserError(f"--term-module {path} is not the file that the run of {run} used: its content differs")


def _run(path: str) -> Any:
    name = f"term_module_{digest_of(path)[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--term-module {path}: expected a Python file, for example my_terms.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where Python looks up the types that its dataclasses name
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UserError(f"--term-module {path} cannot be run{where}: {type(error).__name__}: {error}") from error
    return module


def _checked(path: str, module: Any) -> Mapping[str, type[Term]]:
    terms = getattr(module, "TERMS", None)
    if not isinstance(terms, dict) or not terms:
        raise UserError(f"--term-module {path}: expected TERMS = {{name: term class}}; got {quoted(terms)}")
    for name, kind in terms.items():
        if not (isinstance(name, str) and NAME.fullmatch(name)) or name in ("loss", "logits"):
            raise UserError(
                f"--term-module {path}: the name of a term must consist of small letters, digits and _; got "
                f"{quoted(name)}"
            )
        if name in LOSSES:
            raise UserError(
                f"--term-module {path}: {name} is already the name of a term of the library: choose another"
            )
        if not (isinstance(kind, type) and issubclass(kind, Term)):
            raise UserError(
                f"--term-module {path}: {name} must be a class made from mgd.losses.Term; got {quoted(kind)}"
            )
        fields_of(kind.Hyper)
    return terms
