"""The exit status of a command, and its sentence where something is wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from classification.errors import RunError, Stopped, UserError


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def attempt(work: Callable[[], object], prog: str, say: Callable[[str], object] = _print) -> int:
    """Do the work of a command.

    Args:
        work: what to do.
        prog: the command's name, in front of messages.
        say: takes the sentence about a mistake of the user's.

    Returns:
        0 done, 2 a mistake of the user's, 130 or 143 after SIGINT or SIGTERM, 1 anything else.
    """
    before = None
    with contextlib.suppress(ValueError):  # outside the main thread the caller has its own way to stop
        before = signal.signal(signal.SIGTERM, _stop)
    try:
        work()
    except UserError as error:
        say(f"{prog}: {error}")
        return 2
    except RunError as error:
        _print(f"{prog}: {error}")
        return 1
    except KeyboardInterrupt:
        _print(f"{prog}: interrupted")
        return 128 + signal.SIGINT
    except Stopped as stop:
        if stop.resume:
            name = signal.Signals(stop.signal).name
            _print(f"{prog}: {name}: the state is saved; to resume the run:\n{stop.resume}")
        elif stop.resume is None:
            _print(f"{prog}: {'interrupted' if stop.signal == signal.SIGINT else 'terminated'}")
        return 128 + stop.signal
    except BrokenPipeError:  # the reader of our output, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes when it ends
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return 0


def _stop(number: int, _: FrameType | None) -> None:
    raise Stopped(number)
