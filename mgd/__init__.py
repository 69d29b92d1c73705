"""Matching guided distillation: tensors in, tensors out."""

from mgd import losses
from mgd.ahead import Ahead
from mgd.cost import ChannelCost, channel_cost
from mgd.distiller import Distiller, Mutual
from mgd.flow import Flow, solve_flow
from mgd.layout import tokens_to_map
from mgd.margin import bn_margin, partial_l2
from mgd.matching import ChannelMatching, matchings
from mgd.norms import norms_before
from mgd.reduce import reduce_channels
from mgd.taps import Batch, Outputs, Taps, dry_forward, logits_of
from mgd.teachers import Ensemble, Frozen, View, fold_norms, freeze, has_bfloat16

__all__ = [
    "Ahead",
    "Batch",
    "ChannelCost",
    "ChannelMatching",
    "Distiller",
    "Ensemble",
    "Flow",
    "Frozen",
    "Mutual",
    "Outputs",
    "Taps",
    "View",
    "bn_margin",
    "channel_cost",
    "dry_forward",
    "fold_norms",
    "freeze",
    "has_bfloat16",
    "logits_of",
    "losses",
    "matchings",
    "norms_before",
    "partial_l2",
    "reduce_channels",
    "solve_flow",
    "tokens_to_map",
]
