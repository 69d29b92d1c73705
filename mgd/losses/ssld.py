"""Simple semi-supervised label distillation: agree with a frozen teacher on images with or without labels."""

from __future__ import annotations

from torch import Tensor

from mgd.checks import check_logits, check_unused_target
from mgd.losses.dml import dml
from mgd.losses.term import LogitTerm


def ssld(student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
    """Compute the symmetric `dml` against a frozen teacher: [KL(p_s || p_t) + KL(p_t || p_s)] / 2, batch mean.

    Args:
        student_logits: (B, K); the gradient flows here only.
        teacher_logits: (B, K).
        target: not used; every logit loss takes it.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the shapes of the logits differ.

    Reference: Cui et al., 2021, arXiv:2103.05959, section 3.
    """
    check_logits("ssld", student_logits, teacher_logits)
    check_unused_target("ssld", target)
    return dml(student_logits, teacher_logits, symmetric=True)


class SSLD(LogitTerm):
    """`ssld` as a term, which needs no labels."""

    label_free = True

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> Tensor:
        return ssld(student_logits, teacher_logits, target)
