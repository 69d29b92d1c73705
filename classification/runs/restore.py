"""Check that a checkpoint has everything to resume from: a damaged one is refused before anything runs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from classification.errors import UserError, quoted
from classification.options.terms import is_number
from classification.system.weight_files import damaged_error

# The required entries and their types; numbers must not be negative.
PARTS: dict[str, Any] = {"state_dict": dict, "arch": str, "num_classes": int, "classes": list, "resume": dict}
RESUME: dict[str, Any] = {
    "epoch": int, "step": int, "seconds": (int, float), "extra": dict, "means": dict, "best": dict, "skipped": int,
    "seed": int, "config": dict, "inputs": dict, "peers": dict, "terms": dict, "optimizer": dict, "scaler": dict,
    "ema": dict, "random": list,
}  # fmt: skip
INSIDE = {"config": ("options",), "inputs": ("teachers", "training images"), "best": ("valid_top1", "valid_top5")}


def check_complete(path: str, content: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks an entry, or has one of another type.

    Args:
        path: the file, for the message.
        content: its content; the caller has checked that "resume" is a dictionary.

    Raises:
        UserError: an entry is missing or wrong; the message names it.
    """
    resume = content["resume"]
    for part, kinds in ((content, PARTS), (resume, RESUME)):
        for name, kind in kinds.items():
            value: Any = part.get(name)
            fits = isinstance(value, kind) and not isinstance(value, bool)
            if not fits or (kind not in (dict, list, str) and not (is_number(value) and value >= 0)):
                raise damaged_error(path, f"its {name!r} is {quoted(value)}" if name in part else f"it has no {name!r}")
    for name, keys in INSIDE.items():
        for key in keys:
            if key not in resume[name]:
                raise damaged_error(path, f"its {name!r} has no {key!r}")
    options = resume["config"]["options"]
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise damaged_error(path, f"its options are {quoted(options)}")
    for name in ("best", "extra"):
        if not all(isinstance(key, str) and is_number(value) for key, value in resume[name].items()):
            raise damaged_error(path, f"its {name!r} is {quoted(resume[name])}")
    if resume["step"] and not resume["seconds"]:
        raise damaged_error(path, "its steps took no time")


def load_or_keep(module: nn.Module, load: Callable[[], None]) -> Exception | None:
    """Load a state into a module; if that fails, leave the module as it was and return the error."""
    own = copy.deepcopy(module.state_dict())
    try:
        load()
    except Exception as error:  # a broken state may raise anything
        module.load_state_dict(own)
        return error
    return None


@contextlib.contextmanager
def explain_damage(path: str) -> Iterator[None]:
    """Turn errors while a state is loaded into one sentence.

    Raises:
        UserError: the state is damaged; the message names the file.
    """
    try:
        yield
    except (UserError, NameError, ImportError, NotImplementedError, MemoryError, torch.OutOfMemoryError):
        raise  # an error of the program or the machine, not of the file
    except Exception as error:  # a broken state may raise anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise damaged_error(path, f"{kind}{' '.join(str(error).split())[:200]}") from error
