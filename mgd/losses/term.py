"""The base classes of terms: hyper-parameters, building, updating, and averaging over teachers."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgd.checks import check_logits
from mgd.taps import Batch, Outputs, Probe

Update = tuple[dict[str, float], dict[str, Any]]  # numbers to log, and arrays to keep


class Views(Protocol):
    """The networks' outputs on training images, for `Term.update`; `Distiller.update` provides them.

    A call yields (student outputs, teachers' outputs, batch) for about `num_images` images, or all images for None, in
    eval mode and without gradients. `gradients` also yields one list of gradients per network, those of its
    cross-entropy for its maps. `seed` is that of the run, equal on all ranks.
    """

    @property
    def seed(self) -> int: ...

    def __call__(self, num_images: int | None = None) -> Iterator[tuple[Outputs, list[Outputs], Batch]]: ...

    def gradients(
        self, num_images: int | None = None
    ) -> Iterator[tuple[Outputs, list[Outputs], Batch, list[list[Tensor]]]]: ...


@dataclass(frozen=True, kw_only=True)
class HyperParameters:
    """Hyper-parameters of a term: a frozen dataclass whose fields have types and defaults.

    Raises:
        ValueError: a value is not among those of its `Literal` type.
    """

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            for kind in (hint, *typing.get_args(hint)):  # a Literal, or one of a union
                words = typing.get_args(kind)
                if typing.get_origin(kind) is Literal and value is not None and value not in words:
                    raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(map(str, words))}")

    def without_effect(self) -> Mapping[str, str]:
        """Return {field: setting that it needs} for the fields that have no effect with these values."""
        return {}


class Term(nn.Module):
    """One loss: (student, teachers, batch) -> scalar, the weighted mean of `against` over the teachers.

    A term is built from `Probe`s, updated before every epoch by `update`, and called with `Outputs`. A new term names
    its hyper-parameters in a frozen dataclass `Hyper`, and sets class attributes:

    - `weight`: the factor of the term in a sum by its source; the term itself does not apply it.
    - `needs`: what it cannot do without: "labels", "maps" (of both networks), "index" (of the images in the data set),
      "frozen" (teachers that do not train), "views" (a second augmented view of each image).
    - `uses`: what it uses if it is there.
    - `paired`: whether it compares the networks' maps tap by tap.
    - `rectified`: whether its source reads maps after the ReLU. If `rectify` is set, because the taps lie before a
      ReLU, a ReLU is applied to all maps first.
    - `alone`: whether it reads no teacher. `label_free`: whether it is meant for training without labels.
    - `mutual`: whether its teachers are peers that train, too.
    - `fuses`: whether `torch.compile` makes one fast kernel of it.
    - `relational`: whether it compares the images of a batch with each other.
    - `remembers`: whether a step changes its buffers.

    Args:
        hyper: the hyper-parameters; None for those in `values`, or the defaults.
        teacher_weights: one positive factor per teacher, normalised to sum to 1; None for equal ones.
        values: the hyper-parameters by name, instead of `hyper`.

    Raises:
        ValueError: weights or hyper-parameters are outside their range.
        TypeError: the term has no such hyper-parameter.
    """

    Hyper: ClassVar[type[Any]] = HyperParameters
    hyper: Any
    weight: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[str]] = frozenset()
    paired: ClassVar[bool] = True
    rectified: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    label_free: ClassVar[bool] = False
    mutual: ClassVar[bool] = False
    fuses: ClassVar[bool] = False
    relational: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    rectify: bool = False
    notes: Sequence[str] = ()  # for the user, about how it was built

    def __init__(self, hyper: Any = None, *, teacher_weights: Sequence[float] | None = None, **values: Any) -> None:
        super().__init__()
        if hyper is not None and values:
            raise TypeError(f"{type(self).__name__} takes hyper-parameters as one object or by name, not both")
        self.hyper = self._hyper(hyper, **values)
        self.teacher_weights = _checked(teacher_weights)

    @classmethod
    def _hyper(cls, hyper: Any, **values: Any) -> Any:
        if hyper is not None and type(hyper) is not cls.Hyper:
            raise TypeError(f"{cls.__name__} takes a {cls.Hyper.__qualname__}; got a {type(hyper).__qualname__}")
        return cls.Hyper(**values) if hyper is None else hyper

    @classmethod
    def needed(cls, hyper: Any) -> frozenset[str]:
        """Return `needs` for these hyper-parameters, on which it may depend."""
        return cls.needs

    @classmethod
    def build(cls, student: Probe, teachers: Sequence[Probe], num_images: int, hyper: Any = None) -> Term:
        """Build the term for the networks of a run.

        Args:
            student: of the network that it trains.
            teachers: one per teacher, with its weight.
            num_images: number of training images, for terms with a memory.
            hyper: the hyper-parameters; None for the defaults.

        Raises:
            ValueError: the term does not work with these networks, taps or hyper-parameters.
        """
        hyper = cls._hyper(hyper)
        if "maps" in cls.needs and not student.outputs.features:
            raise ValueError(f"the term {cls.__name__} compares feature maps: tap both networks (mgd.Taps)")
        if "maps" in cls.needs | cls.uses:
            for network in (student, *teachers):
                _ = network.channels  # raises an error if a tapped tensor is not a map
        term = cls.make(student, teachers, num_images, hyper)
        term.rectify = cls.rectified and student.before_relu
        weights = [teacher.weight for teacher in teachers]
        if len(set(weights)) > 1:
            term.teacher_weights = _checked(weights)
        return term

    @classmethod
    def make(cls, student: Probe, teachers: Sequence[Probe], num_images: int, hyper: Any) -> Term:
        """Make the term and its layers; the arguments are those of `build`, which sets the teachers' weights."""
        return cls(hyper)

    def update(self, epoch: int, views: Views) -> Update:
        """Update what the term takes from the networks; called before every epoch, on every rank.

        Args:
            epoch: counted from 0.
            views: the networks' outputs on training images.

        Returns:
            {name: number} to log, and {name: array} to keep. Integer arrays must be equal on all ranks. Arrays whose
            names begin with "cost" or "weights" are large, and are kept of the last update only.
        """
        return {}, {}

    def check_state(self) -> None:
        """Raise ValueError if a loaded state is not valid."""

    def collect(self, *, first: bool) -> None:
        """Move the sums of all ranks to the first rank, for a checkpoint."""

    def forget(self) -> None:
        """Reset the sums of this rank since the last `update`."""

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Return the loss against teacher `number`, a float32 scalar."""
        raise NotImplementedError

    def forward(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> Tensor:
        """Return the loss, a float32 scalar.

        Raises:
            ValueError: there are no teachers, their number differs from that of the weights, or an input is missing.
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
            student, *teachers = (replace(o, features=[F.relu(f) for f in o.features]) for o in (student, *teachers))
        total = student.logits.new_zeros((), dtype=student.logits.float().dtype)
        for number, (weight, teacher) in enumerate(zip(weights, teachers, strict=True)):
            total = total + weight / sum(weights) * self.against(number, student, teacher, batch)
        return total


def per_teacher(weights: Sequence[float] | None, teachers: Sequence[object]) -> Sequence[float]:
    """Return one weight per teacher, equal ones by default; the term then refuses another number of teachers."""
    return [1.0] * len(teachers) if weights is None else weights


def _checked(weights: Sequence[float] | None) -> Sequence[float] | None:
    if weights is not None and not (weights and all(0 < w < inf for w in weights)):
        raise ValueError(f"teacher_weights must be positive; got {weights}")
    return weights


class EachTeacher(Term):
    """The weighted mean of one term per teacher.

    Args:
        terms: one per teacher, each (student, [teacher], batch) -> scalar.
        teacher_weights: see `Term`.
    """

    def __init__(self, terms: Sequence[nn.Module], teacher_weights: Sequence[float] | None = None) -> None:
        super().__init__(teacher_weights=per_teacher(teacher_weights, terms))
        self.terms = nn.ModuleList(terms)

    def check_state(self) -> None:
        for term in self._each():
            term.check_state()

    def collect(self, *, first: bool) -> None:
        for term in self._each():
            term.collect(first=first)

    def forget(self) -> None:
        for term in self._each():
            term.forget()

    def _each(self) -> list[Term]:
        return [term for term in self.terms if isinstance(term, Term)]

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        loss: Tensor = self.terms[number](student, [teacher], batch)
        return loss


def standardise(logits: Tensor) -> Tensor:
    """Give the logits of each image mean 0 and standard deviation 1: (z - mean) / std over the classes.

    Args:
        logits: (B, K).

    Returns:
        (B, K) float32; a constant row becomes 0.

    Raises:
        ValueError: the logits have another shape.

    Reference: Sun et al., 2024, arXiv:2403.01427, algorithm 1.
    """
    check_logits("standardise", logits, logits)
    logits = logits.float()
    # Without this, squares of very large or small logits would overflow or be 0.
    logits = logits / logits.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    deviation = logits.std(dim=1, keepdim=True, unbiased=False)
    constant = deviation <= 1e-6  # up to rounding
    centred = logits - logits.mean(dim=1, keepdim=True)
    return torch.where(constant, 0, centred) / torch.where(constant, 1, deviation)  # NaN stays NaN


def log_probabilities(logits: Tensor) -> Tensor:
    """Compute log softmax(logits) over the classes in float32, with the least float32 for -inf, so that 0 log 0 is 0.

    Args:
        logits: (B, K); -inf leaves a class out.
    """
    logs = F.log_softmax(logits.float(), dim=1)
    return logs.clamp_min(torch.finfo(logs.dtype).min)


class LogitTerm(Term):
    """A term that compares logits; subclasses need only `Hyper` and `compare`."""

    min_classes: ClassVar[int] = 1  # fewer are refused when the term is built

    @dataclass(frozen=True, kw_only=True)
    class Hyper(HyperParameters):
        """Hyper-parameters that every logit loss here has.

        Args:
            standardised: whether both networks' logits pass `standardise` first.
        """

        standardised: bool = False

    def compare(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None) -> Tensor:
        """Return the loss of logits (B, K) against a teacher's, a scalar.

        Args:
            student_logits: the gradient flows here only.
            teacher_logits: without a graph.
            target: (B,) class indices, (B, K) probabilities, or None.
        """
        raise NotImplementedError

    @classmethod
    def make(cls, student: Probe, teachers: Sequence[Probe], num_images: int, hyper: Any) -> Term:
        cls.check_outputs(student.outputs, [teacher.outputs for teacher in teachers])
        return super().make(student, teachers, num_images, hyper)

    @classmethod
    def check_outputs(cls, student: Outputs, teachers: Sequence[Outputs]) -> None:
        """Refuse networks whose logits cannot be compared.

        Raises:
            ValueError: the numbers of classes differ or are too small, or logits are not (B, K).
        """
        for teacher in teachers:
            check_logits(cls.__name__.lower(), student.logits[:1], teacher.logits[:1], min_classes=cls.min_classes)

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return self.compare(*self.compared(student.logits, teacher.logits), batch.target)

    def compared(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of both networks, standardised if the hyper-parameters say so."""
        if getattr(self.hyper, "standardised", False):
            return standardise(student_logits), standardise(teacher_logits)
        return student_logits, teacher_logits
