"""What goes wrong and is told in one sentence."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend; its text says how. Ends the script with status 2 and no traceback."""

    def __init__(self, text: str) -> None:
        # A loading process hands its error over wrapped in a traceback: keep the sentence.
        super().__init__(text.rpartition("UserError: ")[2].strip())


class RunError(Exception):
    """What a run cannot go on after: a loss that is not finite, memory that ran out. Ends the script with status 1."""


class Stopped(BaseException):
    """SIGINT or SIGTERM came, and what is needed to go on is saved.

    Args:
        signal: its number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal
