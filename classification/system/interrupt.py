"""Signals during training: remembered, so that a step, or a file, can be finished."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

from classification.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAVE = getattr(signal, "SIGUSR1", None)  # a scheduler's warning before it ends the job; Windows has none


class Interrupt:
    """Remember signals while the context is open.

    SIGINT and SIGTERM ask to stop. SIGUSR1 asks for a checkpoint, and training continues. Only a second SIGINT, a
    person's, leaves at once: launchers and schedulers send SIGTERM more than once, and must not cut the checkpoint.

    Args:
        what: what is being finished, for the message.
        at_once: whether to leave by raising `Stopped` instead, as long as nothing was done that is not saved.
    """

    def __init__(self, what: str, *, at_once: bool = False) -> None:
        self.what, self.at_once = what, at_once
        self.signal = 0
        self.save = False  # a checkpoint was asked for
        self._typed = 0  # how often SIGINT came
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        handlers: dict[int, Any] = dict.fromkeys(SIGNALS, self._remember)
        if SAVE is not None:
            handlers[SAVE] = self._remember_save
        for number, handler in handlers.items():
            with contextlib.suppress(ValueError):  # outside the main thread the caller has its own way to stop
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take_save(self) -> bool:
        """Return whether a checkpoint was asked for since the last call."""
        asked, self.save = self.save, False
        return asked

    def _remember(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # forked, and about to call `outlast`
        self._typed += number == signal.SIGINT
        if self._typed > 1:
            os._exit(128 + number)
        if self.signal:
            return
        self.signal = number
        if self.at_once:
            raise Stopped(number)
        name, again = signal.Signals(number).name, "Ctrl-C again" if self._typed else "Ctrl-C twice"
        print(f"{name}: finishing {self.what}, then exiting; {again} exits at once", file=sys.stderr, flush=True)

    def _remember_save(self, number: int, _: FrameType | None) -> None:
        if os.getpid() == self._process:
            self.save = True


def ignore_save() -> None:
    """Ignore SIGUSR1, which would end the process, while there is nothing to save."""
    if SAVE is not None:
        with contextlib.suppress(ValueError):
            signal.signal(SAVE, signal.SIG_IGN)


def outlast(_: int = 0, ending: Any = None) -> None:
    """Have a loading process outlast the first signal, which Ctrl-C and launchers send to the whole group.

    The process that trains needs its images to finish the step, and ends it afterwards. After an error its loaders may
    still be there when it ends: it then sends them one signal, and waits for them. As in `Interrupt`, only a second
    SIGINT ends it before.

    Args:
        ending: shared with the process that trains; its value is 1 once that needs no more images.
    """
    typed: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        if ending is not None and ending.value:
            os._exit(0)
        typed.extend([number] * (number == signal.SIGINT))
        if len(typed) > 1:
            os._exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, remember)
    ignore_save()
