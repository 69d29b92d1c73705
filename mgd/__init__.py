"""Matching guided distillation: tensors in, tensors out."""

from mgd import losses
from mgd.cost import ChannelCost, channel_cost
from mgd.distiller import Distiller
from mgd.flow import Flow, solve_flow
from mgd.margin import bn_margin, partial_l2
from mgd.matching import ChannelMatching
from mgd.reduce import reduce_channels
from mgd.taps import Batch, Outputs, Taps, dry_forward, norms_before
from mgd.teachers import Ensemble, freeze

__all__ = [
    "Batch",
    "ChannelCost",
    "ChannelMatching",
    "Distiller",
    "Ensemble",
    "Flow",
    "Outputs",
    "Taps",
    "bn_margin",
    "channel_cost",
    "dry_forward",
    "freeze",
    "losses",
    "norms_before",
    "partial_l2",
    "reduce_channels",
    "solve_flow",
]
