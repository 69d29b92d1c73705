"""How a command begins: names that can be printed, help and mistyped options before torch is imported."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable

from classification.errors import UserError
from classification.options.parser import build_parser
from classification.system.exit_status import attempt


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


def run_command(work: Callable[[list[str]], object], argv: list[str] | None, prog: str) -> int:
    """Do the work of a command that runs in one process, and return its exit status.

    Args:
        work: takes the command line, without the script.
        argv: that line; None for what was typed.
        prog: the command's name, in front of messages.
    """
    write_any_name()
    words = sys.argv[1:] if argv is None else argv
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # they do not name the file that they concern
            return attempt(lambda: work(words), prog)
    except SystemExit:  # a help text was printed
        return 0
