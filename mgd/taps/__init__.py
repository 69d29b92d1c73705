"""Reading maps of any network: taps by module path, layouts, the norm in front of a tap."""

from mgd.taps.layout import as_map, tokens_to_map
from mgd.taps.norms import bn_margin, norms_before
from mgd.taps.probe import Probe, probe
from mgd.taps.taps import Batch, Outputs, TapPoint, Taps, dry_forward, logits_of

__all__ = [
    "Batch",
    "Outputs",
    "Probe",
    "TapPoint",
    "Taps",
    "as_map",
    "bn_margin",
    "dry_forward",
    "logits_of",
    "norms_before",
    "probe",
    "tokens_to_map",
]
