"""What a checkpoint to go on from must hold: it is refused, before anything runs, where it is not whole."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from classification.errors import UserError, shown
from classification.options.terms import is_number

# The parts and their kinds; numbers are not negative.
PARTS: dict[str, Any] = {"state_dict": dict, "arch": str, "num_classes": int, "classes": list, "resume": dict}
RESUME: dict[str, Any] = {
    "epoch": int, "step": int, "seconds": (int, float), "extra": dict, "means": dict, "best": dict, "skipped": int,
    "seed": int, "config": dict, "inputs": dict, "peers": dict, "terms": dict, "optimizer": dict, "scaler": dict,
    "ema": dict, "random": list,
}  # fmt: skip
INSIDE = {"config": ("options",), "inputs": ("teachers", "training images"), "best": ("valid_top1", "valid_top5")}


def damaged(path: str, why: str) -> UserError:
    """Return the error of a checkpoint that is none of ours, or no longer."""
    return UserError(f"{path} is damaged, or was not written by this code ({why}): go on from another")


def check_whole(path: str, content: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks a part, or has one of another kind.

    Args:
        path: the file, for the message.
        content: what it holds; "resume" is known to be a dictionary.

    Raises:
        UserError: naming the part.
    """
    resume = content["resume"]
    for part, kinds in ((content, PARTS), (resume, RESUME)):
        for name, kind in kinds.items():
            value: Any = part.get(name)
            fits = isinstance(value, kind) and not isinstance(value, bool)
            if not fits or (kind not in (dict, list, str) and not (is_number(value) and value >= 0)):
                raise damaged(path, f"its {name!r} is {shown(value)}" if name in part else f"it has no {name!r}")
    for name, keys in INSIDE.items():
        for key in keys:
            if key not in resume[name]:
                raise damaged(path, f"its {name!r} has no {key!r}")
    options = resume["config"]["options"]
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise damaged(path, f"its options are {shown(options)}")
    for name in ("best", "extra"):
        if not all(isinstance(key, str) and is_number(value) for key, value in resume[name].items()):
            raise damaged(path, f"its {name!r} is {shown(resume[name])}")
    if resume["step"] and not resume["seconds"]:
        raise damaged(path, "its steps took no time")


def take_up(module: nn.Module, load: Callable[[], None]) -> Exception | None:
    """Load a state into a module; where that fails, leave the module as it was and return the error."""
    own = copy.deepcopy(module.state_dict())
    try:
        load()
    except Exception as error:  # a broken state raises whatever it happens to mean
        module.load_state_dict(own)
        return error
    return None


@contextlib.contextmanager
def whole(path: str) -> Iterator[None]:
    """Turn what goes wrong while a state is taken up into one sentence.

    Raises:
        UserError: naming the file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a broken state raises whatever it happens to mean
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise damaged(path, f"{kind}{' '.join(str(error).split())[:200]}") from error
