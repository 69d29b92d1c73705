"""DIST: correlation of the probabilities, within each image and within each class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mgd.checks import check_at_least_0, check_logits, check_positive, check_unused_target
from mgd.losses.gather import gather
from mgd.losses.term import LogitTerm
from mgd.taps import Batch, Outputs


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> Tensor:
    """Compute beta (1 - mean_i r(p_s[i, :], p_t[i, :])) + gamma (1 - mean_k r(p_s[:, k], p_t[:, k])).

    r is the Pearson correlation and p = softmax(z / tau). A vector that does not vary has correlation 0, without a
    gradient: every class of a batch of one image, or an image whose probabilities are all equal.

    Args:
        student_logits: (B, K), the whole batch; the gradient flows here only.
        teacher_logits: (B, K).
        target: not used; every logit loss takes it.
        temperature: tau > 0.
        beta: weight of the correlation over the classes of an image.
        gamma: weight of the correlation over the images for a class.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: logits of other shapes, a hyper-parameter outside its range.

    Reference: Huang et al., 2022, arXiv:2205.10536, section 4.
    """
    check_logits("dist", student_logits, teacher_logits)
    check_unused_target("dist", target)
    check_positive("dist", temperature=temperature)
    check_at_least_0("dist", beta=beta, gamma=gamma)
    student, teacher = student_logits.float() / temperature, teacher_logits.detach().float() / temperature
    images = (_unit(student, 1) * _unit(teacher, 1)).sum(dim=1).mean()
    # A class keeps its relation however improbable it is: probabilities are taken over its own largest in the batch.
    student, teacher = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    classes = (_unit(student, 0) * _unit(teacher, 0)).sum(dim=0).mean()
    return beta * (1 - images) + gamma * (1 - classes)


def _unit(logs: Tensor, dim: int) -> Tensor:
    """Centre exp(logs) along `dim` and divide by the length; 0 where the values differ by rounding only.

    A factor common to all values along `dim` drops out, so that the largest is made 1: none overflows, in the backward
    pass neither.
    """
    largest = logs.detach().amax(dim=dim, keepdim=True).clamp_min(torch.finfo(logs.dtype).min)  # it may be -inf
    values = torch.exp(logs - largest)
    centred = values - values.mean(dim=dim, keepdim=True)
    length = torch.linalg.vector_norm(centred, dim=dim, keepdim=True)
    constant = length <= 1e-6 * torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    # Dividing by 1 where nothing varies keeps the backward pass free of 0 / 0.
    return torch.where(constant, 0, centred) / torch.where(constant, 1, length)  # where it is NaN, so is this


class DIST(LogitTerm):
    """`dist` of the batch over all ranks, as a term."""

    relational = True

    weight = 2.0

    @dataclass(frozen=True, kw_only=True)
    class Hyper(LogitTerm.Hyper):
        """Hyper-parameters of `DIST`.

        Args:
            temperature: tau > 0.
            beta: weight of the correlation over the classes of an image, at least 0.
            gamma: weight of the correlation over the images for a class, at least 0.
        """

        temperature: float = 1.0
        beta: float = 1.0
        gamma: float = 1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            check_positive("dist", temperature=self.temperature)
            check_at_least_0("dist", beta=self.beta, gamma=self.gamma)

    hyper: Hyper

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> Tensor:
        return dist(
            student_logits,
            teacher_logits,
            target,
            temperature=self.hyper.temperature,
            beta=self.hyper.beta,
            gamma=self.hyper.gamma,
        )

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        logits = student.logits.float(), teacher.logits.detach().float()
        student, teacher = (Outputs(gather(part, batch.counts)) for part in logits)
        return super().against(number, student, teacher, Batch(epoch=batch.epoch))
