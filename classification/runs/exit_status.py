"""The exit status of a command that works in one process, and its sentence where something is wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from classification.errors import RunError, Stopped, UserError


def attempt(work: Callable[[], object], prog: str) -> int:
    """Do the work of a command.

    Args:
        work: what to do.
        prog: the command's name, in front of messages.

    Returns:
        0 done, 2 a mistake of the user's, 130 or 143 after SIGINT or SIGTERM, 1 anything else.
    """
    before = None
    with contextlib.suppress(ValueError):  # outside the main thread the caller has its own way to stop
        before = signal.signal(signal.SIGTERM, _stop)
    try:
        work()
    except (UserError, RunError) as error:
        print(f"{prog}: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    except Stopped as stop:
        print(f"{prog}: terminated", file=sys.stderr, flush=True)
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
