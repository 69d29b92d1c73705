"""Losses: pure functions by name, and the terms around them in `LOSSES`."""

from torch import nn

from mgd.losses.ce import CE
from mgd.losses.kd import KD, kd

LOSSES: dict[str, type[nn.Module]] = {"ce": CE, "kd": KD}

__all__ = ["CE", "KD", "LOSSES", "kd"]
