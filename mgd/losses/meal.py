"""MEAL V2: follow the mean probabilities of several teachers; a discriminator compares the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgd.checks import check_at_least_0, check_logits, check_positive, check_unused_target
from mgd.losses.term import LogitTerm, log_probabilities, standardise
from mgd.taps import Batch, Outputs, Probe


def meal(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    target: Tensor | None = None,
    *,
    teacher_weights: Sequence[float] | None = None,
) -> Tensor:
    """Compute the similarity -1 / B * sum over images and classes of p_e log p_s, p_e = mean over teachers of p_t.

    Args:
        student_logits: (B, K); the gradient flows here only.
        teacher_logits: one (B, K) per teacher; a tensor alone is one teacher.
        target: not used; every logit loss takes it.
        teacher_weights: one positive factor per teacher, normalised to sum to 1; None for equal ones.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: there are no teachers, their number differs from that of the weights, a weight is not positive, or
            the shapes of the logits differ.

    Reference: Shen, Savvides, 2020, arXiv:2009.08453, section 3.
    """
    teachers: Sequence[Tensor] = [teacher_logits] if isinstance(teacher_logits, Tensor) else list(teacher_logits)
    check_unused_target("meal", target)
    for teacher in teachers:
        check_logits("meal", student_logits, teacher)
    ensemble = _mean([torch.softmax(z.detach().float(), dim=1) for z in teachers], teacher_weights)
    return -(ensemble * log_probabilities(student_logits)).sum(dim=1).mean()


def _mean(tensors: Sequence[Tensor], weights: Sequence[float] | None) -> Tensor:
    weights = [1.0] * len(tensors) if weights is None else weights
    if not tensors or len(tensors) != len(weights):
        raise ValueError(f"meal needs one weight per teacher; got {len(weights)} weights and {len(tensors)} teachers")
    for weight in weights:
        check_positive("meal", teacher_weights=weight)
    scaled = [weight / sum(weights) * tensor for weight, tensor in zip(weights, tensors, strict=True)]
    return torch.stack(scaled).sum(dim=0)


class MEAL(LogitTerm):
    """a * meal(z_s, teachers) + b * cross-entropy of a discriminator of z_s and the weighted mean of the teachers' z_t.

    The discriminator has linear layers of widths K, K/8, K/64 and 2, at least 2 each, with ReLUs in between. Its
    targets are (1, 0) for the student and (0, 1) for the ensemble; the binary cross-entropy is the mean over both.

    Student and discriminator both minimise this sum, as published. No gradient is reversed, so the discriminator's term
    makes the student's logits easier to tell from the ensemble's, while the similarity pulls them together. The
    published code has a ReLU after the last layer too, so no answer is below 0; here there is none.

    Args:
        num_classes: K, at least 2.
        hyper: the hyper-parameters, see `Term`.
        teacher_weights: see `Term`.
        values: the hyper-parameters by name.

    Reference: Shen, Savvides, 2020, arXiv:2009.08453, section 3.
    """

    min_classes = 2
    label_free = True

    @dataclass(frozen=True, kw_only=True)
    class Hyper(LogitTerm.Hyper):
        """Hyper-parameters of `MEAL`.

        Args:
            similarity: a, at least 0.
            discriminator: b, at least 0.
        """

        similarity: float = 1.0
        discriminator: float = 1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            check_at_least_0("meal", similarity=self.similarity, discriminator=self.discriminator)

    hyper: Hyper

    def __init__(
        self,
        num_classes: int,
        hyper: Hyper | None = None,
        *,
        teacher_weights: Sequence[float] | None = None,
        **values: Any,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2; got {num_classes}")
        super().__init__(hyper, teacher_weights=teacher_weights, **values)
        first, second = max(num_classes // 8, 2), max(num_classes // 64, 2)
        self.discriminator = nn.Sequential(
            nn.Linear(num_classes, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 2)
        )

    @classmethod
    def make(cls, student: Probe, teachers: Sequence[Probe], num_images: int, hyper: Any) -> MEAL:
        cls.check_outputs(student.outputs, [teacher.outputs for teacher in teachers])
        return cls(student.num_classes, hyper)

    def forward(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> Tensor:
        student_logits = student.logits.float()
        teacher_logits = [teacher.logits.detach().float() for teacher in teachers]
        if self.hyper.standardised:
            student_logits = standardise(student_logits)
            teacher_logits = [standardise(logits) for logits in teacher_logits]
        similarity = meal(student_logits, teacher_logits, teacher_weights=self.teacher_weights)
        ensemble_logits = _mean(teacher_logits, self.teacher_weights)
        discrimination = self._discriminate(student_logits, ensemble_logits)
        return self.hyper.similarity * similarity + self.hyper.discriminator * discrimination

    def _discriminate(self, student_logits: Tensor, ensemble_logits: Tensor) -> Tensor:
        """Return the binary cross-entropy of the discriminator's answers, both inputs (B, K)."""
        answers = self.discriminator(torch.cat([student_logits, ensemble_logits])).float()  # (2B, 2)
        is_student = (torch.arange(len(answers), device=answers.device) < len(student_logits)).float()
        truth = torch.stack([is_student, 1 - is_student], dim=1)  # (2B, 2)
        return F.binary_cross_entropy_with_logits(answers, truth)
