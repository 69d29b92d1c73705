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

    r is the Pearson correlation and p = softmax(z / tau). A constant vector has correlation 0, without a
    gradient: every class in a batch of one image, or an image whose probabilities are all equal.

    Args:
        student_logits: (B, K), of the whole batch; the gradient flows here only.
        teacher_logits: (B, K).
        target: not used; every logit loss takes it.
        temperature: tau > 0.
        beta: weight of the correlation over the classes of an image.
        gamma: weight of the correlation over the images for a class.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the shapes of the logits differ, or a hyper-parameter is outside its range.

    Reference: Huang et al., 2022, arXiv:2205.10536, section 4.
    """
    check_logits("dist", student_logits, teacher_logits)
    check_unused_target("dist", target)
    check_positive("dist", temperature=temperature)
    check_at_least_0("dist", beta=beta, gamma=gamma)
    student, teacher = student_logits.float() / temperature, teacher_logits.detach().float() / temperature
    images = (_unit(student, 1) * _unit(teacher, 1)).sum(dim=1).mean()
    # `_unit` divides a class's probabilities by their largest in the batch, so that they may be arbitrarily small.
    student, teacher = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    classes = (_unit(student, 0) * _unit(teacher, 0)).sum(dim=0).mean()
    return beta * (1 - images) + gamma * (1 - classes)


def _unit(logs: Tensor, dim: int) -> Tensor:
    """Centre exp(logs) along `dim` and divide by the length; 0 if the values differ only by rounding.

    A common factor of all values along `dim` does not change the result. So they are scaled to a maximum of 1, and
    nothing overflows, also in the backward pass.
    """
    largest = logs.detach().amax(dim=dim, keepdim=True).clamp_min(torch.finfo(logs.dtype).min)  # it may be -inf
    values = torch.exp(logs - largest)
    centred = values - values.mean(dim=dim, keepdim=True)
    length = torch.linalg.vector_norm(centred, dim=dim, keepdim=True)
    constant = length <= 1e-6 * torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    # Dividing constant values by 1 avoids 0 / 0 in the backward pass.
    return torch.where(constant, 0, centred) / torch.where(constant, 1, length)  # NaN stays NaN


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
