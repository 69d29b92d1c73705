"""Knowledge review: the student's stage, fused with its deeper ones, follows the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgd.checks import check_maps
from mgd.flow import Flow
from mgd.losses.align import same_size, start_from
from mgd.losses.pool import pool
from mgd.losses.starting import StartingTerm, StartOptions
from mgd.taps import Batch, Outputs, Probe, as_map


def context_loss(student: Tensor, teacher: Tensor, *, sizes: Sequence[int] = (4, 2, 1)) -> Tensor:
    """Compute sum over l of w_l * mean (pool_l(student) - pool_l(teacher))^2 / sum of w_l.

    The first l is the whole map with weight 1; each size smaller than the map follows with half the weight of the one
    before it. A size that is not smaller is left out and halves nothing.

    Args:
        student: (B, C, H, W); the gradient flows here only.
        teacher: (B, C, H', W'); the larger map is average-pooled to the size of the smaller.
        sizes: sides of the pooled maps, descending.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the arguments are not maps, or their numbers of images or channels differ; or a size is below 1.

    Reference: Chen et al., 2021, arXiv:2104.09044, section 3.3.
    """
    check_maps("context_loss", student, teacher, same="channels")
    if not all(size >= 1 for size in sizes):
        raise ValueError(f"context_loss: sizes must be at least 1; got {tuple(sizes)}")
    student, teacher = same_size(student.float(), teacher.detach().float())
    loss, factor, total = F.mse_loss(student, teacher), 1.0, 1.0
    for size in sizes:
        if size < min(student.shape[2:]):
            factor /= 2
            total += factor
            pooled = pool(student, (size, size)), pool(teacher, (size, size))
            loss = loss + factor * F.mse_loss(pooled[0], pooled[1])
    return loss / total


class _Fusion(nn.Module):
    """Fuse one stage with the deeper ones by two attention maps, which weight them pixel by pixel."""

    def __init__(self, num_student: int, num_teacher: int, width: int, *, deepest: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(num_student, width, 1, bias=False), nn.BatchNorm2d(width))
        self.attention = None if deepest else nn.Conv2d(2 * width, 2, 1)
        self.leave = nn.Sequential(nn.Conv2d(width, num_teacher, 3, padding=1, bias=False), nn.BatchNorm2d(num_teacher))

    def forward(self, student: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the fused map (B, width, H, W) for the next shallower stage, and the same at the teacher's width."""
        fused: Tensor = self.enter(student)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            share = self.attention(torch.cat([fused, deeper], dim=1)).sigmoid()  # (B, 2, H, W)
            fused = share[:, :1] * fused + share[:, 1:] * deeper
        return fused, self.leave(fused)


class ReviewKD(StartingTerm):
    """Sum over the stages of `context_loss` between the fused student map and the teacher's.

    From the deepest stage k = n to the first, with a_k, b_k = sigmoid(conv1[e_k; up(f_{k+1})]):

    e_k = BN(conv1(student_k)), f_n = e_n, f_k = a_k e_k + b_k up(f_{k+1})
    loss = sum over k of context_loss(BN(conv3(f_k)), teacher_k)

    up repeats pixels to the size of e_k. Tap k of the student is compared with tap k of the teacher; if their sizes
    differ, the larger map is average-pooled. Published runs let the weight grow over the first 20 epochs.

    Args:
        student_channels: width of the student's map at every tap, the shallowest first.
        teacher_channels: the same of every teacher.
        hyper: the hyper-parameters, see `Term`.
        teacher_weights: see `Term`.
        values: the hyper-parameters by name.

    Raises:
        ValueError: there are no taps, or a teacher has another number of them.

    Reference: Chen et al., 2021, arXiv:2104.09044, section 3.
    """

    needs = frozenset({"maps"})

    @dataclass(frozen=True, kw_only=True)
    class Hyper(StartOptions):
        """Hyper-parameters of `ReviewKD`, and those of `StartOptions`.

        With `init` "flow", conv1 starts as the identity, and the middle of conv3 with the pairs of the flow; the width
        must be at least that of every student tap.

        Args:
            width: number of channels of e_k and f_k, at least 1; None for that of the student's last tap, at most 512
                (64 in networks for CIFAR).
        """

        width: int | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.width is not None and self.width < 1:
                raise ValueError(f"width must be at least 1; got {self.width}")

    hyper: Hyper

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[Sequence[int]],
        hyper: Hyper | None = None,
        *,
        teacher_weights: Sequence[float] | None = None,
        **values: Any,
    ) -> None:
        num = len(student_channels)
        if num == 0 or any(len(channels) != num for channels in teacher_channels):
            counts = ", ".join(str(len(channels)) for channels in teacher_channels)
            raise ValueError(
                f"expected one tap per stage in every network; the student has {num}, the teachers {counts}"
            )
        super().__init__(
            student_channels, teacher_channels, range(num), hyper, teacher_weights=teacher_weights, **values
        )
        width = min(512, student_channels[-1]) if self.hyper.width is None else self.hyper.width
        if self.hyper.init == "flow" and width < max(student_channels):
            raise ValueError(
                f"init 'flow' passes on every channel of the student: width must be at least {max(student_channels)}; "
                f"it is {width}"
            )
        self.fusions = nn.ModuleList(
            nn.ModuleList(
                _Fusion(s, t, width, deepest=stage == num - 1)
                for stage, (s, t) in enumerate(zip(student_channels, channels, strict=True))
            )
            for channels in teacher_channels
        )

    @classmethod
    def make(cls, student: Probe, teachers: Sequence[Probe], num_images: int, hyper: Any) -> ReviewKD:
        return cls(student.channels, [teacher.channels for teacher in teachers], hyper)

    def begin(self, number: int, position: int, flow: Flow) -> None:
        fusion = self.get_submodule(f"fusions.{number}.{position}")
        assert isinstance(fusion, _Fusion)
        enter = fusion.enter[0]
        assert isinstance(enter, nn.Conv2d)
        nn.init.dirac_(enter.weight)
        start_from(fusion.leave, flow)

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        fusions = self.fusions[number]
        assert isinstance(fusions, nn.ModuleList)
        stages = list(zip(fusions, student.features, teacher.features, strict=True))
        loss = student.logits.new_zeros((), dtype=torch.float32)
        deeper: Tensor | None = None
        for fusion, student_map, teacher_map in reversed(stages):
            deeper, restored = fusion(as_map(student_map).float(), deeper)
            loss = loss + context_loss(restored, as_map(teacher_map))
        return loss
