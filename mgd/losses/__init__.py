"""Losses: pure functions by name, and the terms around them in `LOSSES`."""

from mgd.losses.ce import CE
from mgd.losses.dist import DIST, dist
from mgd.losses.dkd import DKD, dkd
from mgd.losses.dml import DML, dml
from mgd.losses.kd import KD, kd
from mgd.losses.meal import MEAL, meal
from mgd.losses.ssld import SSLD
from mgd.losses.term import Term, standardise
from mgd.losses.wsl import WSL, wsl

LOSSES: dict[str, type[Term]] = {
    "ce": CE,
    "dist": DIST,
    "dkd": DKD,
    "dml": DML,
    "kd": KD,
    "meal": MEAL,
    "ssld": SSLD,
    "wsl": WSL,
}

__all__ = [
    "CE",
    "DIST",
    "DKD",
    "DML",
    "KD",
    "LOSSES",
    "MEAL",
    "SSLD",
    "WSL",
    "Term",
    "dist",
    "dkd",
    "dml",
    "kd",
    "meal",
    "standardise",
    "wsl",
]
