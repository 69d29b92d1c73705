"""Multi-level logit distillation: probabilities, similarity of images and of classes, at several temperatures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mgd.checks import check_at_least_0, check_logits, check_positive, check_unused_target
from mgd.losses.gather import gather
from mgd.losses.term import LogitTerm, log_probabilities
from mgd.taps import Batch, Outputs

TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)


def mlkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    instance: float = 0.5,
    batch: float = 0.5,
    classes: float = 0.5,
) -> Tensor:
    """Compare probabilities, the similarity of images and the similarity of classes.

    sum over temperatures tau of [ instance * tau^2 / B * sum over images of KL(p_t || p_s)
    + batch / B * |P_s P_s^T - P_t P_t^T|^2 + classes / K * |P_s^T P_s - P_t^T P_t|^2 ]

    P (B, K) holds the probabilities p = softmax(z / tau) of all images, and |.|^2 is the sum of squares.

    Args:
        student_logits: (B, K); the gradient flows here only.
        teacher_logits: (B, K).
        target: not used; every logit loss takes it.
        temperatures: each tau > 0.
        instance: weight of the probabilities, at least 0.
        batch: weight of the similarity of images, at least 0.
        classes: weight of the similarity of classes, at least 0.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the shapes of the logits differ, there are no temperatures, one is not positive, or a weight is
            negative.

    Reference: Jin, Wang, Lin, 2023, CVPR, "Multi-level logit distillation", and the authors' code. There,
        a mask keeps the images (or classes) on which the teacher is at most as confident as on the median one. But it
        multiplies a mean, so its only effect is a factor of one half on each weight: the default weights here.
    """
    check_logits("mlkd", student_logits, teacher_logits)
    check_unused_target("mlkd", target)
    _check(temperatures, instance=instance, batch=batch, classes=classes)
    student_logits, teacher_logits = student_logits.float(), teacher_logits.detach().float()
    total = student_logits.new_zeros(())
    for temperature in temperatures:
        student = log_probabilities(student_logits / temperature)
        teacher = log_probabilities(teacher_logits / temperature)
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        total = total + instance * temperature**2 * divergence
        if batch or classes:
            p, q = student.exp(), teacher.exp()
            total = total + batch * _gap(p, q, len(p)) + classes * _gap(p.T, q.T, p.shape[1])
    return total


def _gap(student: Tensor, teacher: Tensor, number: int) -> Tensor:
    """Return |S S^T - T T^T|^2 / number for (number, N) matrices."""
    with torch.autocast("cuda" if student.is_cuda else "cpu", enabled=False):  # it would round to 16 bits
        return (student @ student.T - teacher @ teacher.T).square().sum() / number


def _check(temperatures: Sequence[float], **weights: float) -> None:
    if not isinstance(temperatures, Sequence) or isinstance(temperatures, str):
        raise TypeError(f"mlkd: temperatures must be a list of numbers; got {temperatures!r}")
    if not temperatures:
        raise ValueError("mlkd: temperatures must name one or more; got none")
    for temperature in temperatures:
        check_positive("mlkd", temperature=temperature)
    check_at_least_0("mlkd", **weights)


class MLKD(LogitTerm):
    """`mlkd` of the first view, and the probabilities of the second, over the batch of all ranks.

    In the authors' code, the second view is compared at all temperatures except the lowest and the highest. There, the
    first view is compared once more. `form="published"` does so.
    """

    needs = frozenset({"views"})
    relational = True
    weight = 0.9

    @dataclass(frozen=True, kw_only=True)
    class Hyper(LogitTerm.Hyper):
        """Hyper-parameters of `MLKD`.

        Args:
            temperatures: each tau > 0.
            instance: weight of the probabilities of the first view.
            second: weight of the probabilities of the second view; with 0, no second view is needed.
            batch: weight of the similarity of images, at least 0.
            classes: weight of the similarity of classes, at least 0.
            form: "corrected", or "published", which compares the second view as the authors' code does.
        """

        temperatures: tuple[float, ...] = TEMPERATURES
        instance: float = 0.5
        second: float = 1.0
        batch: float = 0.5
        classes: float = 0.5
        form: Literal["corrected", "published"] = "corrected"

        def __post_init__(self) -> None:
            super().__post_init__()
            _check(
                self.temperatures, instance=self.instance, second=self.second, batch=self.batch, classes=self.classes
            )

    hyper: Hyper

    @classmethod
    def needed(cls, hyper: Any) -> frozenset[str]:
        return cls.needs if hyper.second else frozenset()

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> Tensor:
        hyper = self.hyper
        return mlkd(
            student_logits,
            teacher_logits,
            temperatures=hyper.temperatures,
            instance=hyper.instance,
            batch=hyper.batch,
            classes=hyper.classes,
        )

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        first = self._gathered(student, teacher, batch)
        loss = self.compare(*first, None)
        if not self.hyper.second:
            return loss
        if not (student.more and teacher.more):
            raise ValueError(
                "the term MLKD compares two views of each image, and this batch has one: pass images (B, 2, 3, H, W), "
                "or set second=0"
            )
        second = self._gathered(student.more[0], teacher.more[0], batch)
        ends = (min(self.hyper.temperatures), max(self.hyper.temperatures))
        for temperature in self.hyper.temperatures:
            slip = self.hyper.form == "published" and temperature in ends
            pair = first if slip else second
            loss = loss + mlkd(*pair, temperatures=(temperature,), instance=self.hyper.second, batch=0.0, classes=0.0)
        return loss

    def _gathered(self, student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = student.logits.float(), teacher.logits.detach().float()
        first, second = (gather(part, batch.counts) for part in logits)
        return self.compared(first, second)
