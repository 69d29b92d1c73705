"""Update the terms before an epoch; print, log and save what they return."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from classification.errors import RunError
from classification.options import config
from classification.runs import launch
from classification.runs.checkpoint import save_arrays
from classification.training.engine import Engine
from mgd import Distiller


def update_terms(engine: Engine, distiller: Distiller, epoch: int) -> dict[str, float]:
    """Update every term from the networks, and return the numbers to log.

    Raises:
        RunError: an update fails, or its result differs between the ranks.
    """
    world, when = engine.world, config.epoch_name(engine.options.optimisation, epoch)

    def batches(num_images: int | None) -> Any:
        for network in distiller.networks:
            world.share_state(network)
        return engine.training_images(epoch, num_images)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            updates = distiller.update(epoch, batches, seed=engine.seed, context=engine.autocast)
        except (ValueError, RuntimeError) as error:
            if launch.lost_a_rank(error):
                raise
            raise RunError(f"the update of the terms before {when} failed: {error}") from error
    for warning in caught:
        world.say(f"!! WARNING: {warning.message}")
    numbers: dict[str, float] = {}
    arrays: dict[str, Any] = {}
    for name, (logged, kept) in updates.items():
        if logged:
            world.say(f"=> {name} before {when}: " + "  ".join(f"{key} {value:.4g}" for key, value in logged.items()))
        numbers |= {key if key not in numbers else f"{name}_{key}": value for key, value in logged.items()}
        arrays |= {key if key not in arrays else f"{name}_{key}": value for key, value in kept.items()}
    if arrays:
        world.check_same(_hash(arrays), f"what the terms found before {when}")
        if world.first and not engine.options.run.calibrate:
            save_arrays(engine.job.folder / "flow", arrays, epoch)
    return numbers


def _hash(arrays: Mapping[str, Any]) -> int:
    """Hash the integer arrays to a 63-bit number, so that ranks can compare theirs."""
    integers = [value for value in map(np.ascontiguousarray, arrays.values()) if value.dtype.kind in "iu"]
    digest = hashlib.sha256(b"".join(value.tobytes() for value in integers)).digest()
    return int.from_bytes(digest[:8], "big") >> 1
