"""Frozen teachers: fast, without a graph, as ensembles, one batch ahead, or as stored outputs."""

from mgd.teachers.ahead import Ahead
from mgd.teachers.stored import keep_top, spread_rest
from mgd.teachers.teachers import Ensemble, Frozen, View, fold_norms, freeze, has_bfloat16

__all__ = [
    "Ahead",
    "Ensemble",
    "Frozen",
    "View",
    "fold_norms",
    "freeze",
    "has_bfloat16",
    "keep_top",
    "spread_rest",
]
