"""Cross-entropy against the labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mgd.checks import check_logits, check_target
from mgd.losses.term import HyperParameters, Term
from mgd.taps import Batch, Outputs


class CE(Term):
    """Cross-entropy of the student's logits against the target, batch mean."""

    needs = frozenset({"labels"})
    alone = True

    @dataclass(frozen=True, kw_only=True)
    class Hyper(HyperParameters):
        """Hyper-parameters of `CE`.

        Args:
            label_smoothing: share of the target mass spread over all classes, in [0, 1).
            views: the cross-entropy of the "first" view of each image, or the sum over "all" that a batch has.

        Raises:
            ValueError: a label_smoothing outside [0, 1).
        """

        label_smoothing: float = 0.0
        views: Literal["first", "all"] = "first"

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.label_smoothing < 1:
                raise ValueError(f"label_smoothing must be at least 0 and below 1; got {self.label_smoothing}")

    hyper: Hyper

    def forward(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> Tensor:
        if batch.target is None:
            raise ValueError("the term 'ce' needs labels, and this batch has none: leave it out of the terms")
        check_logits("ce", student.logits, student.logits)
        check_target("ce", batch.target, student.logits, mixed=True)
        target = batch.target.float() if batch.target.is_floating_point() else batch.target
        seen = [student, *(student.more if self.hyper.views == "all" else ())]
        losses = [F.cross_entropy(o.logits.float(), target, label_smoothing=self.hyper.label_smoothing) for o in seen]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()
