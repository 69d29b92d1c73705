"""WKD of logits: the cost of moving one prediction to the other, where similar classes are near."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mgd.checks import check_at_least_0, check_counts, check_logits, check_positive, check_target, check_tensors
from mgd.losses.term import LogitTerm, log_probabilities, per_teacher
from mgd.taps import Batch, Outputs, Probe

LEAST = -1e36  # smallest logit; finite, so that the softmax exists if all other classes are left out
LARGEST = 40.0  # of cost / epsilon: exp(-2 * 40) is still a float32


def class_cost(prototypes: Tensor, *, sharpening: float = 1.0) -> Tensor:
    """Compute 1 - exp(-sharpening * (1 - cos(w_i, w_j))), the cost between classes i and j.

    Args:
        prototypes: (K, D), the rows of the teacher's last linear layer.
        sharpening: > 0.

    Returns:
        (K, K) float32, 0 on the diagonal; a row of zeros has cosine 0 with all others.

    Raises:
        ValueError: the prototypes are not a matrix, or the sharpening is not positive.

    Reference: Lv, Yang, Li, 2024, arXiv:2412.08139, with the option "fc" of the authors' code. Their published numbers
        are not comparable: they use another similarity, the CKA of features of each class's training images.
    """
    check_tensors("class_cost", prototypes=prototypes)
    check_positive("class_cost", sharpening=sharpening)
    if prototypes.ndim != 2:
        raise ValueError(f"class_cost needs prototypes (K, D), one row per class; got {tuple(prototypes.shape)}")
    unit = F.normalize(prototypes.detach().float(), dim=1)
    with torch.autocast(unit.device.type, enabled=False):
        distance = (1 - unit @ unit.T).clamp_min(0)
    return (1 - torch.exp(-sharpening * distance)).fill_diagonal_(0)


def wkd_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    cost: Tensor,
    temperature: float = 2.0,
    wasserstein_weight: float = 30.0,
    epsilon: float = 0.05,
    iterations: int = 10,
) -> Tensor:
    """Compute 1/B * sum over images of [-p_t(y) log p_s(y) + wasserstein_weight * W(q_s, q_t)].

    p = softmax(z), y is the target, and q = softmax(z / tau) over the classes other than y. W is <P, cost>, with the
    entropic transport plan P after a number of Sinkhorn iterations, the last of which makes its row sums q_s.

    Args:
        student_logits: (B, K); the gradient flows here only, through all iterations.
        teacher_logits: (B, K).
        target: (B,) class indices y, or (B, K) probabilities, whose largest is y; None takes the teacher's most
            probable class.
        cost: (K, K), at least 0, as `class_cost` makes it.
        temperature: tau > 0 of the transport.
        wasserstein_weight: of the transport, at least 0; the weight of the target's part is 1.
        epsilon: strength of the entropy, in units of the cost; at least 1/40 of the largest cost.
        iterations: of the Sinkhorn algorithm, at least 1.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the shapes of the logits differ, or there are fewer than two classes; the target is not valid; the
            cost has another shape, or (checked on the CPU only) is below 0 or too large for epsilon; or a
            hyper-parameter is outside its range.

    Reference: Lv, Yang, Li, 2024, arXiv:2412.08139. The defaults are those of the authors' code on ImageNet (R34 ->
        R18), and so are the first part and the direction of the iterations.
    """
    check_logits("wkd_logits", student_logits, teacher_logits, min_classes=2)
    _check_hyper(temperature, wasserstein_weight, epsilon, iterations)
    check_tensors("wkd_logits", cost=cost)
    num_classes = student_logits.shape[1]
    if cost.shape != (num_classes, num_classes):
        raise ValueError(f"wkd_logits needs a cost {(num_classes, num_classes)}; got {tuple(cost.shape)}")
    _check_cost(cost, epsilon)
    teacher_logits = teacher_logits.detach()
    if target is None:
        target = teacher_logits.argmax(dim=1)
    else:
        check_target("wkd_logits", target, student_logits, mixed=True)
    own = (target if target.ndim == 1 else target.argmax(dim=1))[:, None]
    certain = log_probabilities(teacher_logits).gather(1, own).exp()
    targets = -(certain * log_probabilities(student_logits).gather(1, own)).mean()
    masses = [_others(logits.float() / temperature, own) for logits in (student_logits, teacher_logits)]
    return targets + wasserstein_weight * _transport(masses[0], masses[1], cost.float(), epsilon, iterations).mean()


def _others(logits: Tensor, own: Tensor) -> Tensor:
    """Return the probabilities (B, K) over all classes except the target, 0 at the target."""
    is_target = torch.zeros_like(logits, dtype=torch.bool).scatter(1, own, True)
    return F.softmax(logits.clamp_min(LEAST).masked_fill(is_target, -torch.inf), dim=1)


def _transport(student: Tensor, teacher: Tensor, cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    """(B, K), (B, K), (K, K) -> (B,): <P, cost> for every image."""
    with torch.autocast(student.device.type, enabled=False):
        kernel = torch.exp(-cost / epsilon)
        # Classes of mass 0 have no effect, so all images share one kernel, although each leaves out its own target.
        rows = ((student > 0) | (teacher > 0) | student.isnan()).to(student.dtype)
        for _ in range(iterations):
            columns = teacher / (rows @ kernel)
            rows = student / (columns @ kernel.T)
        return ((rows @ (kernel * cost)) * columns).sum(dim=1)


def _check_cost(cost: Tensor, epsilon: float) -> None:
    if cost.device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU it would wait for the device
        low, high = (float(value) for value in cost.aminmax())
        if not (low >= 0 and high <= LARGEST * epsilon):
            raise ValueError(
                f"wkd_logits needs costs from 0 to {LARGEST:g} epsilon, {LARGEST * epsilon:g} here; got {low:g} to "
                f"{high:g}: divide the costs, or raise epsilon"
            )


def _check_hyper(temperature: float, wasserstein_weight: float, epsilon: float, iterations: int) -> None:
    check_positive("wkd_logits", temperature=temperature, epsilon=epsilon)
    check_counts("wkd_logits", iterations=iterations)
    check_at_least_0("wkd_logits", wasserstein_weight=wasserstein_weight)
    if epsilon * LARGEST < 1:
        raise ValueError(
            f"wkd_logits: epsilon must be at least {1 / LARGEST:g}, as costs reach 1 and float32 has no number for "
            f"exp(-2 / epsilon) below that; got {epsilon}"
        )


class WKDLogits(LogitTerm):
    """`wkd_logits` as a term; the cost comes from the last linear layer of each teacher.

    Args:
        costs: (K, K) of every teacher, see `class_cost`.
        hyper: the hyper-parameters, see `Term`.
        teacher_weights: see `Term`.
        values: the hyper-parameters by name.
    """

    @dataclass(frozen=True, kw_only=True)
    class Hyper(LogitTerm.Hyper):
        """Hyper-parameters of `WKDLogits`.

        Args:
            temperature: tau of the transport, > 0.
            wasserstein_weight: weight of the transport, at least 0; that of the target's part is 1.
            epsilon: strength of the entropy, in units of the cost, at least 0.025.
            iterations: number of Sinkhorn iterations, at least 1.
            sharpening: > 0; larger values make the costs of similar and of different classes more equal.
        """

        temperature: float = 2.0
        wasserstein_weight: float = 30.0
        epsilon: float = 0.05
        iterations: int = 10
        sharpening: float = 1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            _check_hyper(self.temperature, self.wasserstein_weight, self.epsilon, self.iterations)
            check_positive("wkd_logits", sharpening=self.sharpening)

    hyper: Hyper

    def __init__(
        self,
        costs: Sequence[Tensor],
        hyper: Hyper | None = None,
        *,
        teacher_weights: Sequence[float] | None = None,
        **values: Any,
    ) -> None:
        super().__init__(hyper, teacher_weights=per_teacher(teacher_weights, costs), **values)
        for number, cost in enumerate(costs):  # not stored: a resumed run computes it from the same teacher
            self.register_buffer(f"cost{number}", cost.detach().clone().float(), persistent=False)

    @classmethod
    def needed(cls, hyper: Any) -> frozenset[str]:
        return cls.needs | {"frozen"}

    @classmethod
    def make(cls, student: Probe, teachers: Sequence[Probe], num_images: int, hyper: Any) -> WKDLogits:
        for teacher in teachers:
            check_logits("wkd_logits", student.outputs.logits[:1], teacher.outputs.logits[:1], min_classes=2)
        return cls([class_cost(_prototypes(teacher), sharpening=hyper.sharpening) for teacher in teachers], hyper)

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        hyper = self.hyper
        logits = self.compared(student.logits, teacher.logits)
        return wkd_logits(
            *logits,
            batch.target,
            cost=self.get_buffer(f"cost{number}"),
            temperature=hyper.temperature,
            wasserstein_weight=hyper.wasserstein_weight,
            epsilon=hyper.epsilon,
            iterations=hyper.iterations,
        )


def _prototypes(teacher: Probe) -> Tensor:
    if not teacher.frozen:
        raise ValueError("the term wkd_logits needs a teacher whose classifier is trained, not peers that train")
    if teacher.classifier is None:
        raise ValueError(
            "the term wkd_logits takes the cost between classes from the last linear layer of the teacher, and the "
            "logits of this one are no output of such a layer: choose another teacher or term"
        )
    return teacher.classifier
