"""Read the maps of any network: taps by module path, layouts, and the norm before a tap."""

from mgd.taps.discovery import describe_taps, find_taps
from mgd.taps.layout import as_map, tokens_to_map
from mgd.taps.norms import bn_margin, norms_before
from mgd.taps.pairing import pair_taps
from mgd.taps.paths import TapPoint
from mgd.taps.probe import Probe, probe
from mgd.taps.tap import Tap, table
from mgd.taps.taps import Batch, Outputs, Taps, dry_forward, logits_of

__all__ = [
    "Batch",
    "Outputs",
    "Probe",
    "Tap",
    "TapPoint",
    "Taps",
    "as_map",
    "bn_margin",
    "describe_taps",
    "dry_forward",
    "find_taps",
    "logits_of",
    "norms_before",
    "pair_taps",
    "probe",
    "table",
    "tokens_to_map",
]
