"""Knowledge distillation: the student's softened probabilities against the teacher's."""

from __future__ import annotations

from dataclasses import dataclass

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
        ValueError: the shapes of the logits differ, or the temperature is not positive.

    Reference: Hinton, Vinyals, Dean, 2015, arXiv:1503.02531, section 2.
    """
    check_logits("kd", student_logits, teacher_logits)
    check_unused_target("kd", target)
    check_positive("kd", temperature=temperature)
    student = log_probabilities(student_logits.float() / temperature)
    teacher = log_probabilities(teacher_logits.detach().float() / temperature)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


class KD(LogitTerm):
    """`kd` as a term."""

    @dataclass(frozen=True, kw_only=True)
    class Hyper(LogitTerm.Hyper):
        """Hyper-parameters of `KD`.

        Args:
            temperature: tau > 0.
        """

        temperature: float = 4.0

        def __post_init__(self) -> None:
            super().__post_init__()
            check_positive("kd", temperature=self.temperature)

    hyper: Hyper

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> Tensor:
        return kd(student_logits, teacher_logits, target, temperature=self.hyper.temperature)
