"""The states of all random number generators, as tensors and numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from classification.runs.world import World


def random_state(world: World) -> list[dict[str, Any]]:
    """Return the states of Python, NumPy, torch and the GPU, one entry per rank; every rank must call it."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state()  # a tuple; NumPy has a dict for other generators
    kind, keys, position, has_gauss, cached = legacy
    own = {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else None,
    }
    if world.size == 1:
        return [own]
    states: list[Any] = [None] * world.size
    dist.all_gather_object(states, own)
    return states


def set_random_state(states: list[dict[str, Any]], world: World) -> bool:
    """Restore this rank's state; return False, and change nothing, if the number of ranks differs.

    Raises:
        ValueError: the states are damaged.
    """
    if len(states) != world.size:
        return False
    try:
        _set(states[world.rank], world)
    except Exception as error:  # a broken state may raise anything
        raise ValueError("the states of its random number generators do not fit") from error
    return True


def _set(own: dict[str, Any], world: World) -> None:
    version, words, gauss = own["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, position, has_gauss, cached = own["numpy"]
    if not 0 <= position <= len(keys):  # NumPy would read after the end of its table
        raise ValueError
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(own["torch"])
    if own["cuda"] is not None and world.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"], world.device)
