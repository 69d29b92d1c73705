"""SIGINT and SIGTERM during training: remembered, so that a step can be finished; a second one leaves at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

from classification.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Remember the first signal while the context is open.

    Args:
        what: what is being finished, for the message.
        at_once: whether to leave by raising `Stopped` instead, as long as nothing was done that is not saved.
    """

    def __init__(self, what: str, *, at_once: bool = False) -> None:
        self.what, self.at_once = what, at_once
        self.signal = 0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            with contextlib.suppress(ValueError):  # outside the main thread the caller has its own way to stop
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # forked, and about to call `outlast`
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        if self.at_once:
            raise Stopped(number)
        name = signal.Signals(number).name
        print(f"{name}: finishing {self.what}, then leaving; once more leaves at once", file=sys.stderr, flush=True)


def outlast(_: int = 0, ending: Any = None) -> None:
    """Have a loading process outlast the first signal, which Ctrl-C and launchers send to the whole group.

    The process that trains needs its images to finish the step, and ends it afterwards. After an error its loaders may
    still be there when it ends: it then sends them one signal, and waits for them.

    Args:
        ending: shared with the process that trains; its value is 1 once that needs no more images.
    """
    came: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        if ending is not None and ending.value:
            os._exit(0)
        if came:
            os._exit(128 + number)
        came.append(number)

    for number in SIGNALS:
        signal.signal(number, remember)
