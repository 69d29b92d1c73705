"""Reading maps of any network: taps by module path, layouts, the norm in front of a tap."""

from mgd.taps.layout import tokens_to_map
from mgd.taps.norms import norms_before
from mgd.taps.taps import Batch, Outputs, TapPoint, Taps, dry_forward, logits_of

__all__ = [
    "Batch",
    "Outputs",
    "TapPoint",
    "Taps",
    "dry_forward",
    "logits_of",
    "norms_before",
    "tokens_to_map",
]
