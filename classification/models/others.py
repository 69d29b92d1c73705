"""What checkpoints of other code say of their networks, as far as it can be understood."""

from __future__ import annotations

import argparse
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from classification.data.preprocessing import Preprocessing

SEEN = ("img_size", "mean", "std")  # the keys whose meaning is everywhere the same
CLASSES = ("classes", "class_to_idx", "idx_to_class", "class_names")
OPTIONS = ("args", "hyper_parameters", "config")  # where the options of a training are kept


def not_ours(said: Mapping[str, Any]) -> list[str]:
    """Name the keys of a file of other code that do not say what ours do."""
    number = said.get("num_classes")
    unread = [] if isinstance(said.get("arch", ""), str) or said["arch"] is None else ["arch"]
    if isinstance(number, (str, float, bool, list, tuple, Mapping)):
        unread.append("num_classes")
    for key in CLASSES:
        names = said.get(key)
        names = names.tolist() if isinstance(names, np.ndarray) else names
        listed = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        if names is not None and not (listed or isinstance(names, Mapping)):
            unread.append(key)
    for keys in (("img_size",), ("mean", "std")):
        seen = {key: said[key] for key in keys if said.get(key) is not None}
        unread += [] if _makes_sense(seen) else seen
    return unread


def seen_in_options(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return size, mean and std of the images where the options of a training say them, as timm's files do."""
    for key in OPTIONS:
        options = content.get(key)
        if isinstance(options, (argparse.Namespace, types.SimpleNamespace)):
            options = vars(options)
        if isinstance(options, Mapping):
            seen = {name: options[name] for name in SEEN if options.get(name) is not None}
            if seen and _makes_sense(seen):
                return seen
    return {}


def _makes_sense(seen: Mapping[str, Any]) -> bool:
    try:
        Preprocessing().with_values(seen)
    except ValueError:
        return False
    return True
