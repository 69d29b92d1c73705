"""Random draws that depend only on the given numbers, not on earlier draws."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def seeded_draws(*numbers: int) -> Iterator[None]:
    """Seed torch's generator with these numbers; afterwards it continues as if nothing had been drawn."""
    state_before = torch.random.get_rng_state()
    torch.random.default_generator.manual_seed(_combine(*numbers))
    try:
        yield
    finally:
        torch.random.set_rng_state(state_before)


def _combine(*numbers: int) -> int:
    """Combine numbers into one 63-bit seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
