"""Toy networks for the tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mgd import Batch, Outputs, Probe
from mgd.losses import MLKD, Term

T = TypeVar("T", bound=Term)


class Toy(nn.Module):
    """Two stages with an in-place, shared ReLU and an in-place sum, the hard cases of capturing."""

    def __init__(self, width: int = 4, num_classes: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        out: Tensor = self.fc(self.relu(y).mean((2, 3)))
        return out


def has_gradient(tensor: Tensor) -> bool:
    """Whether a backward reached `tensor`, with something other than zeros."""
    return tensor.grad is not None and bool(tensor.grad.any())


TOY_TAPS = ("relu@in#0", "relu@in#-1")


def toy_maps(net: Toy, x: Tensor) -> list[Tensor]:
    """The two maps before the ReLU, by hand."""
    first = net.bn1(net.conv1(x))
    second = net.bn2(net.conv2(torch.relu(first))) + torch.relu(first)
    return [first, second]


def toy(width: int = 4, seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    net = Toy(width)
    for bn in (net.bn1, net.bn2):
        assert bn.running_mean is not None and bn.running_var is not None
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
        nn.init.normal_(bn.running_mean)
        nn.init.uniform_(bn.running_var, 0.5, 2)
    return net


def classifier(outputs: Outputs) -> Tensor:
    """Weights of a last layer for networks that have none but outputs."""
    return torch.randn(outputs.logits.shape[1], 6, generator=torch.Generator().manual_seed(0))


def built(
    kind: type[T],
    student: Outputs,
    teachers: Sequence[Outputs],
    num_images: int = 10,
    *,
    teacher_weights: Sequence[float] | None = None,
    margins: Sequence[Sequence[Tensor | None]] | None = None,
    **values: Any,
) -> T:
    """The term for networks of such outputs, as a run builds it."""
    weights = teacher_weights or [1.0] * len(teachers)
    if kind is MLKD and not student.more:  # outputs of one view
        values = {"second": 0.0, **values}
    given = margins or [()] * len(teachers)
    probes = [
        Probe(t, weight=w, margins=m, classifier=classifier(t))
        for t, w, m in zip(teachers, weights, given, strict=True)
    ]
    term = kind.build(Probe(student, frozen=False), probes, num_images, kind.Hyper(**values))
    assert isinstance(term, kind)
    return term


@dataclass
class Seen:
    """`mgd.losses.Views` of outputs that the networks have given: (student, teachers) of every batch."""

    batches: Sequence[tuple[Outputs, Sequence[Outputs]]]
    seed: int = 0
    asked: list[int | None] = field(default_factory=list)  # numbers of images, one per pass

    def __call__(self, num_images: int | None = None) -> Iterator[tuple[Outputs, list[Outputs], Batch]]:
        self.asked.append(num_images)
        for student, teachers in self.batches:
            yield student, list(teachers), Batch()

    def gradients(
        self, num_images: int | None = None
    ) -> Iterator[tuple[Outputs, list[Outputs], Batch, list[list[Tensor]]]]:
        """Gradients of ones, so that maps times gradients are the maps."""
        for student, teachers, batch in self(num_images):
            ones = [[torch.ones_like(m) for m in outputs.features] for outputs in (student, *teachers)]
            yield student, teachers, batch, ones


def ready(kind: type[T], student: Outputs, teachers: Sequence[Outputs], num_images: int = 10, **options: Any) -> T:
    """`built`, and brought up to date on these outputs, as before an epoch."""
    term = built(kind, student, teachers, num_images, **options)
    term.update(0, Seen([(student, teachers)]))
    return term
