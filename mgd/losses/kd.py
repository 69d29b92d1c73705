"""Knowledge distillation: the student's softened probabilities against the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from mgd.checks import check_logits, check_positive, check_unused_target
from mgd.losses.term import LogitTerm, log_probabilities


def kd(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, *, temperature: float = 4.0
) -> Tensor:
    """Compute tau^2 / B * sum over images of KL(softmax(z_t / tau) || softmax(z_s / tau)).

    Args:
        student_logits: (B, K); the gradient flows here only.
        teacher_logits: (B, K).
        target: not used; every logit loss takes it.
        temperature: tau > 0.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: logits of other shapes, a temperature that is not positive.

    Reference: Hinton, Vinyals, Dean, 2015, arXiv:1503.02531, section 2.
    """
    check_logits("kd", student_logits, teacher_logits)
    check_unused_target("kd", target)
    check_positive("kd", temperature=temperature)
    student = log_probabilities(student_logits.float() / temperature)
    teacher = log_probabilities(teacher_logits.detach().float() / temperature)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


class KD(LogitTerm):
    """`kd` as a term.

    Args:
        temperature: tau > 0.
        standardised: see `LogitTerm`.
        teacher_weights: see `Term`.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        *,
        standardised: bool = False,
        teacher_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(kd, standardised=standardised, teacher_weights=teacher_weights, temperature=temperature)
