"""What every term shares: what it needs, how it averages over teachers, and logit functions as terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgd.checks import check_logits, check_positive
from mgd.taps import Batch, Outputs


class Term(nn.Module):
    """One loss: (student, teachers, batch) -> scalar, the weighted mean of `compare` over the teachers.

    `weight` is the default factor of the term in a sum, as its source has it. `needs` names what it cannot do without:
    "labels", "maps" (of both networks), "index" (of the images in the data set); `uses` what it takes where it is
    there. `paired` says whether it compares the networks' maps tap by tap, `rectified` whether its source reads maps
    behind the ReLU; with `rectify` set, maps pass one first, and may be tapped in front of it as for others. A term
    whose layers depend on shapes is built from `Outputs` of a dry forward; see `from_outputs`.

    Args:
        teacher_weights: one positive factor a teacher, normalised to sum to 1; None for equal ones.
    """

    weight: ClassVar[float] = 1.0
    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[str]] = frozenset()
    paired: ClassVar[bool] = True
    rectified: ClassVar[bool] = False
    rectify: bool = False

    def __init__(self, teacher_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if teacher_weights is not None and not (teacher_weights and all(0 < w < inf for w in teacher_weights)):
            raise ValueError(f"teacher_weights must be positive; got {teacher_weights}")
        self.teacher_weights = teacher_weights

    @classmethod
    def from_outputs(cls, student: Outputs, teachers: Sequence[Outputs], num_images: int, **options: Any) -> Term:
        """Build the term for networks that return such outputs.

        Args:
            student: outputs of one dry forward of any batch size.
            teachers: the same, one a teacher.
            num_images: training images, for terms with a memory.
            options: hyper-parameters, as of the constructor.
        """
        return cls(**options)

    def compare(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss against teacher `number`, a float32 scalar."""
        raise NotImplementedError

    def forward(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> Tensor:
        """Return the loss, a float32 scalar.

        Raises:
            ValueError: no teachers, another number of them than weights, or what the term needs is missing.
        """
        name = type(self).__name__
        if "labels" in self.needs and batch.target is None:
            raise ValueError(f"the term {name} needs labels, and this batch has none: leave it out of the terms")
        if "maps" in self.needs and not all(o.features for o in (student, *teachers)):
            raise ValueError(f"the term {name} compares feature maps: tap both networks (mgd.Taps)")
        if "index" in self.needs and batch.index is None:
            raise ValueError(f"the term {name} needs the images' positions in the data set: pass index")
        weights = self.teacher_weights or [1.0] * len(teachers)
        if not teachers or len(weights) != len(teachers):
            raise ValueError(f"the term {name} has {len(weights)} teacher weights and got {len(teachers)} teachers")
        if self.rectify:
            student, *teachers = (Outputs(o.logits, [F.relu(f) for f in o.features]) for o in (student, *teachers))
        total = student.logits.new_zeros((), dtype=student.logits.float().dtype)
        for number, (weight, teacher) in enumerate(zip(weights, teachers, strict=True)):
            total = total + weight / sum(weights) * self.compare(number, student, teacher, batch)
        return total


class EachTeacher(Term):
    """A term of its own for every teacher, and their weighted mean.

    Args:
        terms: one a teacher, each (student, [teacher], batch) -> scalar.
        teacher_weights: see `Term`.
    """

    def __init__(self, terms: Sequence[nn.Module], teacher_weights: Sequence[float] | None = None) -> None:
        super().__init__([1.0] * len(terms) if teacher_weights is None else teacher_weights)
        self.terms = nn.ModuleList(terms)

    def compare(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        loss: Tensor = self.terms[number](student, [teacher], batch)
        return loss


def standardise(logits: Tensor) -> Tensor:
    """Give the logits of each image mean 0 and standard deviation 1: (z - mean) / std over the classes.

    Args:
        logits: (B, K).

    Returns:
        (B, K) float32; a constant row becomes 0.

    Raises:
        ValueError: logits of another shape.

    Reference: Sun et al., 2024, arXiv:2403.01427, algorithm 1.
    """
    check_logits("standardise", logits, logits)
    logits = logits.float()
    # The squares of logits as they are would overflow, or be 0, before the logits do.
    logits = logits / logits.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    deviation = logits.std(dim=1, keepdim=True, unbiased=False)
    constant = deviation <= 1e-6  # but for rounding
    centred = logits - logits.mean(dim=1, keepdim=True)
    return torch.where(constant, 0, centred) / torch.where(constant, 1, deviation)  # where it is NaN, so is this


def log_probabilities(logits: Tensor) -> Tensor:
    """Compute log softmax(logits) over the classes, in float32; the least float32 where it is -inf: 0 log 0 is then 0.

    Args:
        logits: (B, K); -inf leaves a class out.
    """
    logs = F.log_softmax(logits.float(), dim=1)
    return logs.clamp_min(torch.finfo(logs.dtype).min)


class LogitTerm(Term):
    """A logit loss as a term.

    Args:
        function: (student_logits, teacher_logits, target=None, *, hyper-parameters) -> scalar.
        standardised: whether both networks' logits pass `standardise` first.
        teacher_weights: see `Term`.
        hyper: the hyper-parameters.

    Raises:
        ValueError: a temperature that is not positive.
    """

    min_classes: ClassVar[int] = 1  # fewer are refused when the term is built

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        standardised: bool = False,
        teacher_weights: Sequence[float] | None = None,
        **hyper: float,
    ) -> None:
        super().__init__(teacher_weights)
        check_positive(type(self).__name__.lower(), temperature=hyper.get("temperature", 1.0))
        self.function, self.standardised, self.hyper = function, standardised, hyper

    @classmethod
    def check_outputs(cls, student: Outputs, teachers: Sequence[Outputs]) -> None:
        """Refuse networks whose logits cannot be compared.

        Raises:
            ValueError: other classes of a teacher than of the student, too few, or logits that are not (B, K).
        """
        for teacher in teachers:
            check_logits(cls.__name__.lower(), student.logits[:1], teacher.logits[:1], min_classes=cls.min_classes)

    @classmethod
    def from_outputs(cls, student: Outputs, teachers: Sequence[Outputs], num_images: int, **options: Any) -> Term:
        cls.check_outputs(student, teachers)
        return cls(**options)

    def compare(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        logits = (student.logits, teacher.logits)
        if self.standardised:
            logits = (standardise(logits[0]), standardise(logits[1]))
        return self.function(*logits, batch.target, **self.hyper)
