"""WTTM: the student follows the teacher's probabilities raised to a power, with a weight per image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mgd.checks import check_logits, check_positive, check_unused_target
from mgd.losses.term import LogitTerm, log_probabilities


def wttm(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, *, exponent: float = 0.2
) -> Tensor:
    """Compute 1/B * sum over images of U * KL(q_t || softmax(z_s)), with U = sum_k p_k^gamma and q_t = p^gamma / U.

    p = softmax(z_t) are the teacher's probabilities. The student has no temperature. For exponents below 1, U is larger
    for images of which the teacher is less sure.

    Args:
        student_logits: (B, K); the gradient flows here only.
        teacher_logits: (B, K).
        target: not used; every logit loss takes it.
        exponent: gamma > 0, the inverse of a temperature.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the shapes of the logits differ, or the exponent is not positive.

    Reference: Zheng, Yang, 2024, arXiv:2402.11148. The authors' code has the same formula. The default exponent
        and weight are the only ones in their instructions for this loss (beside CRD on CIFAR-100); they tune both for
        each pair.
    """
    check_logits("wttm", student_logits, teacher_logits)
    check_unused_target("wttm", target)
    check_positive("wttm", exponent=exponent)
    powers = exponent * log_probabilities(teacher_logits.detach())
    image_weights = torch.logsumexp(powers, dim=1).exp()
    divergences = F.kl_div(
        log_probabilities(student_logits), log_probabilities(powers), reduction="none", log_target=True
    ).sum(dim=1)
    return (image_weights * divergences).mean()


class WTTM(LogitTerm):
    """`wttm` as a term."""

    weight = 4.0

    @dataclass(frozen=True, kw_only=True)
    class Hyper(LogitTerm.Hyper):
        """Hyper-parameters of `WTTM`.

        Args:
            exponent: gamma > 0; the teacher's probabilities are raised to it.
        """

        exponent: float = 0.2

        def __post_init__(self) -> None:
            super().__post_init__()
            check_positive("wttm", exponent=self.exponent)

    hyper: Hyper

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> Tensor:
        return wttm(student_logits, teacher_logits, target, exponent=self.hyper.exponent)
