"""Weighted soft labels: less weight on images whose label the student already predicts better than the teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mgd.checks import check_logits, check_positive, check_target
from mgd.losses.term import LogitTerm, log_probabilities


def wsl(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, *, temperature: float = 2.0
) -> Tensor:
    """Compute tau^2 / B * sum over images of w * CE(softmax(z_t / tau), softmax(z_s / tau)).

    w = 1 - exp(-CE_s / (CE_t + 1e-7)), with CE_s and CE_t the cross-entropies of the label at tau = 1; w has no
    gradient.

    Args:
        student_logits: (B, K); the gradient flows here only.
        teacher_logits: (B, K).
        target: (B,) class indices, or (B, K) probabilities of mixed images.
        temperature: tau > 0.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the target is missing or does not fit the logits, the shapes of the logits differ, or the
            temperature is not positive.

    Reference: Zhou et al., 2021, arXiv:2102.00650, section 4.
    """
    if target is None:
        raise ValueError("wsl weighs images by their labels, and got no target: pass the class indices")
    check_logits("wsl", student_logits, teacher_logits)
    check_positive("wsl", temperature=temperature)
    check_target("wsl", target, student_logits, mixed=True)
    student, teacher = student_logits.float(), teacher_logits.detach().float()
    student_error = F.cross_entropy(student.detach(), target, reduction="none")
    teacher_error = F.cross_entropy(teacher, target, reduction="none")
    weight = -torch.expm1(-student_error / (teacher_error + 1e-7))
    soft = torch.softmax(teacher / temperature, dim=1) * log_probabilities(student / temperature)
    return -(temperature**2) * (weight * soft.sum(dim=1)).mean()


class WSL(LogitTerm):
    """`wsl` as a term; with `standardised`, its weights are those of the standardised logits, too."""

    needs = frozenset({"labels"})
    weight = 2.5

    @dataclass(frozen=True, kw_only=True)
    class Hyper(LogitTerm.Hyper):
        """Hyper-parameters of `WSL`.

        Args:
            temperature: tau > 0.
        """

        temperature: float = 2.0

        def __post_init__(self) -> None:
            super().__post_init__()
            check_positive("wsl", temperature=self.temperature)

    hyper: Hyper

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> Tensor:
        return wsl(student_logits, teacher_logits, target, temperature=self.hyper.temperature)
