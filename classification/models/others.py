"""Read the descriptions in checkpoints of other code, as far as they are understood."""

from __future__ import annotations

import argparse
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from classification.data.preprocessing import Preprocessing

COMMON_KEYS = ("img_size", "mean", "std")  # preprocessing keys that mean the same everywhere
CLASS_KEYS = ("classes", "class_to_idx", "idx_to_class", "class_names")
OPTION_KEYS = ("args", "hyper_parameters", "config")  # keys of the training's options


def not_understood(content: Mapping[str, Any]) -> list[str]:
    """Return the keys of a file of other code whose values have another meaning than in our files."""
    num_classes = content.get("num_classes")
    ignored = [] if isinstance(content.get("arch", ""), str) or content["arch"] is None else ["arch"]
    if isinstance(num_classes, (str, float, bool, list, tuple, Mapping)):
        ignored.append("num_classes")
    for key in CLASS_KEYS:
        names = content.get(key)
        names = names.tolist() if isinstance(names, np.ndarray) else names
        is_list = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        if names is not None and not (is_list or isinstance(names, Mapping)):
            ignored.append(key)
    for keys in (("img_size",), ("mean", "std")):
        values = {key: content[key] for key in keys if content.get(key) is not None}
        ignored += [] if _is_valid(values) else values
    return ignored


def preprocessing_in_options(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return size, mean and std of the images from the training's options in a file, as timm writes them."""
    for key in OPTION_KEYS:
        options = content.get(key)
        if isinstance(options, (argparse.Namespace, types.SimpleNamespace)):
            options = vars(options)
        if isinstance(options, Mapping):
            values = {name: options[name] for name in COMMON_KEYS if options.get(name) is not None}
            if values and _is_valid(values):
                return values
    return {}


def _is_valid(values: Mapping[str, Any]) -> bool:
    try:
        Preprocessing().with_values(values)
    except ValueError:
        return False
    return True
