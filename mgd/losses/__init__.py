"""Losses: pure functions by name, and the terms around them in `LOSSES`."""

from mgd.losses.ce import CE
from mgd.losses.kd import KD, kd
from mgd.losses.term import Term, standardise

LOSSES: dict[str, type[Term]] = {"ce": CE, "kd": KD}

__all__ = ["CE", "KD", "LOSSES", "Term", "kd", "standardise"]
