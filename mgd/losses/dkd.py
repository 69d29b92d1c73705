"""Decoupled knowledge distillation: the target class and the other classes have separate weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mgd.checks import check_at_least_0, check_logits, check_positive, check_target
from mgd.losses.term import LogitTerm, log_probabilities


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """Compute tau^2 / B * sum over images of [alpha KL(b_t || b_s) + beta KL(q_t || q_s)].

    With p = softmax(z / tau) and y the target class, b = (p_y, 1 - p_y) and q_k = p_k / (1 - p_y) over the k != y.

    Args:
        student_logits: (B, K); the gradient flows here only.
        teacher_logits: (B, K).
        target: (B,) class indices y; None takes the teacher's most probable class.
        temperature: tau > 0.
        alpha: weight of the first term, on target and other classes as a whole.
        beta: weight of the classes that are not the target.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the shapes of the logits differ, or there are fewer than two classes; the target is not a class
            index; or a hyper-parameter is outside its range.

    Reference: Zhao et al., 2022, arXiv:2203.08679, equation 7.
    """
    check_logits("dkd", student_logits, teacher_logits, min_classes=2)
    check_positive("dkd", temperature=temperature)
    check_at_least_0("dkd", alpha=alpha, beta=beta)
    teacher_logits = teacher_logits.detach()
    if target is None:
        target = teacher_logits.argmax(dim=1)
    else:
        check_target("dkd", target, student_logits, mixed=False)
    student_masses, student_others = _split(student_logits.float() / temperature, target)
    teacher_masses, teacher_others = _split(teacher_logits.float() / temperature, target)
    masses = F.kl_div(student_masses, teacher_masses, reduction="batchmean", log_target=True)
    others = F.kl_div(student_others, teacher_others, reduction="batchmean", log_target=True)
    return temperature**2 * (alpha * masses + beta * others)


def _split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return log b (B, 2) and log q (B, K), the latter 0 at the target."""
    target = target[:, None]
    own = torch.zeros_like(logits, dtype=torch.bool).scatter(1, target, True)
    log_p = log_probabilities(logits)
    rest = log_p.masked_fill(own, -torch.inf)
    # log(1 - p_y) by a sum over the others: for a confident network, the difference would round to log 0.
    mass = rest.logsumexp(dim=1, keepdim=True)
    return torch.cat([log_p.gather(1, target), mass], dim=1), (rest - mass).masked_fill(own, 0)


class DKD(LogitTerm):
    """`dkd` as a term; images without labels take the teacher's class."""

    uses = frozenset({"labels"})
    min_classes = 2

    @dataclass(frozen=True, kw_only=True)
    class Hyper(LogitTerm.Hyper):
        """Hyper-parameters of `DKD`.

        Args:
            temperature: tau > 0.
            alpha: see `dkd`, at least 0.
            beta: weight of the classes that are not the target, at least 0.
        """

        temperature: float = 1.0
        alpha: float = 1.0
        beta: float = 0.5

        def __post_init__(self) -> None:
            super().__post_init__()
            check_positive("dkd", temperature=self.temperature)
            check_at_least_0("dkd", alpha=self.alpha, beta=self.beta)

    hyper: Hyper

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> Tensor:
        return dkd(
            student_logits,
            teacher_logits,
            target,
            temperature=self.hyper.temperature,
            alpha=self.hyper.alpha,
            beta=self.hyper.beta,
        )
