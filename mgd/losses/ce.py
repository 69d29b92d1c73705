"""Cross-entropy against the labels."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mgd.checks import check_logits, check_target
from mgd.losses.term import HyperParameters, Term
from mgd.taps import Batch, Outputs


class CE(Term):
    """Cross-entropy of the student's logits against the target, batch mean: 1/B sum_b sum_k w_k q_bk (-log p_bk)."""

    needs = frozenset({"labels"})
    alone = True

    @dataclass(frozen=True, kw_only=True)
    class Hyper(HyperParameters):
        """Hyper-parameters of `CE`.

        Args:
            label_smoothing: share of the target mass spread over all classes, in [0, 1).
            views: "first", the cross-entropy of the first view of each image; "all", the sum over all views.
            class_weights: the weight of each of the K classes, or None for 1.

        Raises:
            ValueError: label_smoothing is outside [0, 1), a class weight is negative or not finite, or all are 0.
        """

        label_smoothing: float = 0.0
        views: Literal["first", "all"] = "first"
        class_weights: tuple[float, ...] | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.label_smoothing < 1:
                raise ValueError(f"label_smoothing must be at least 0 and below 1; got {self.label_smoothing}")
            weights = self.class_weights
            if weights is not None and not (any(weights) and all(0 <= weight < inf for weight in weights)):
                raise ValueError(f"class_weights must be finite numbers of at least 0, some above it; got {weights}")

    hyper: Hyper
    class_weights: Tensor | None

    def __init__(self, hyper: Any = None, **values: Any) -> None:
        super().__init__(hyper, **values)
        weights = None if self.hyper.class_weights is None else torch.tensor(self.hyper.class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> Tensor:
        if batch.target is None:
            raise ValueError("the term 'ce' needs labels, and this batch has none: leave it out of the terms")
        check_logits("ce", student.logits, student.logits)
        check_target("ce", batch.target, student.logits, mixed=True)
        target = batch.target.float() if batch.target.is_floating_point() else batch.target
        views = [student, *(student.more if self.hyper.views == "all" else ())]
        losses = [self._of(outputs.logits.float(), target) for outputs in views]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _of(self, logits: Tensor, target: Tensor) -> Tensor:
        smoothing, weights = self.hyper.label_smoothing, self.class_weights
        if weights is None:
            return F.cross_entropy(logits, target, label_smoothing=smoothing)
        if len(weights) != logits.shape[1]:
            raise ValueError(
                f"the term 'ce' has {len(weights)} class_weights for {logits.shape[1]} classes: give one each"
            )
        # torch's own mean divides by the weights in the batch, so an image's weight would depend on the other images.
        return F.cross_entropy(logits, target, weights, reduction="sum", label_smoothing=smoothing) / len(logits)
