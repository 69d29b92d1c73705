"""Answer help and mistyped options at once, before torch is imported."""

from __future__ import annotations

import contextlib
import os
import sys

from classification.errors import UserError
from classification.options.parser import build_parser


def write_any_name() -> None:
    """Let both output streams print names of files that are not valid text, with escapes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def first_look(words: list[str], prog: str, *, distillation: bool) -> int | None:
    """Answer --help, --help-all and mistyped options.

    Returns:
        The exit status, or None where there is work to do.
    """
    write_any_name()
    parser = build_parser(prog, distillation=distillation)
    try:
        parser.parse_args(words)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every rank of this machine finds the same
            print(f"{prog}: {error}", file=sys.stderr, flush=True)
        return 2
    except SystemExit:  # a help text was printed
        return 0
    return None
