"""Errors that are reported in one sentence."""

from __future__ import annotations

import os
import re

CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def one_line(text: str) -> str:
    """Write line ends and other control characters, which names of files may have, as escapes."""
    return CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def quoted(value: object, most: int = 100) -> str:
    """Quote a value that a user gave, or its beginning; bytes as the text that they are."""
    text = repr(os.fsdecode(value) if isinstance(value, bytes) else value)
    return text if len(text) <= most else f"{text[:most]} ..."


class UserError(Exception):
    """A mistake that the user can mend; its text says how. Ends the script with status 2 and no traceback.

    Args:
        text: one sentence.
        table: lines that follow it, or nothing.
    """

    def __init__(self, text: str, table: str = "") -> None:
        # A loading process hands its error over wrapped in a traceback: keep the sentence.
        sentence = one_line(text.rpartition("UserError: ")[2].strip())
        super().__init__("\n".join([sentence, *map(one_line, table.splitlines())]))


class RunError(Exception):
    """A run cannot continue: its loss is not finite, or memory ran out. Ends the script with status 1."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived, and a checkpoint to resume from is saved.

    Args:
        signal: its number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal
        self.resume: str | None = None  # the command that resumes the run; "" on a rank that leaves it to another
