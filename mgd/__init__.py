"""Matching guided distillation: tensors in, tensors out.

Your own training loop takes these steps:

1. `Taps(network, paths)` reads maps of student and teacher; `find_taps` and `pair_taps` find paths.
2. `probe` both, the teacher before its norms are folded: one forward finds widths of maps, norms and margins.
3. `losses.LOSSES[name].build(student_probe, [teacher_probe], num_images)` makes each term.
4. `Distiller(student, freeze(teacher), {name: (term, weight)})`; optimise its `parameters()`: student and terms.
5. `distiller.update(epoch, batches)` before every epoch, then `distiller(images, target)["loss"]` for every batch.
"""

from mgd import losses
from mgd.distiller import Distiller
from mgd.flow import ChannelCost, Flow, Plan, channel_cost, solve_flow, solve_plan
from mgd.losses.margin import partial_l2
from mgd.losses.mgd import ChannelMatching
from mgd.losses.reduce import reduce_channels
from mgd.taps import (
    Batch,
    Outputs,
    Probe,
    Tap,
    Taps,
    bn_margin,
    describe_taps,
    dry_forward,
    find_taps,
    logits_of,
    norms_before,
    pair_taps,
    probe,
    tokens_to_map,
)
from mgd.teachers import Ahead, Ensemble, Frozen, View, fold_norms, freeze, has_bfloat16, keep_top, spread_rest

__all__ = [
    "Ahead",
    "Batch",
    "ChannelCost",
    "ChannelMatching",
    "Distiller",
    "Ensemble",
    "Flow",
    "Frozen",
    "Outputs",
    "Plan",
    "Probe",
    "Tap",
    "Taps",
    "View",
    "bn_margin",
    "channel_cost",
    "describe_taps",
    "dry_forward",
    "find_taps",
    "fold_norms",
    "freeze",
    "has_bfloat16",
    "keep_top",
    "logits_of",
    "losses",
    "norms_before",
    "pair_taps",
    "partial_l2",
    "probe",
    "reduce_channels",
    "solve_flow",
    "solve_plan",
    "spread_rest",
    "tokens_to_map",
]
