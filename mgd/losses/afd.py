"""Attention-based feature distillation: learned weights say which student tap follows which teacher tap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgd.checks import check_maps, check_tensors
from mgd.losses.at import energy
from mgd.losses.pool import pool
from mgd.losses.term import HyperParameters, Term, per_teacher
from mgd.taps import Batch, Outputs, Probe, as_map


def afd(student: Sequence[Tensor], teacher: Sequence[Tensor], attention: Tensor) -> Tensor:
    """Compute 1/B * sum over images and tap pairs of a[t, s] * mean over pixels of (v_s / |v_s| - v_t / |v_t|)^2.

    v is the `energy` of a map, flattened over the pixels; the student's is first average-pooled to the size of teacher
    map t (or repeated, if it is smaller).

    Args:
        student: (B, S, H, W) maps, one per tap; the gradient flows here and to the attention only.
        teacher: (B, T, H', W') maps, one per tap; their number may differ from the student's.
        attention: (B, teacher taps, student taps), weights that sum to 1 over the student taps.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the arguments are not maps of the same images, or the attention has another shape.

    Reference: Ji, Heo, Park, 2021, arXiv:2102.02973, section 3.
    """
    for teacher_map in teacher:
        for student_map in student:
            check_maps("afd", student_map, teacher_map)
    check_tensors("afd", attention=attention)
    shape = (len(student[0]) if student else 0, len(teacher), len(student))
    if 0 in shape or attention.shape != shape:
        raise ValueError(
            f"afd needs attention (B, teacher taps, student taps) = {shape}, at least one each; "
            f"got {tuple(attention.shape)}"
        )
    energies = [energy(x) for x in student]
    gaps = []
    for teacher_map in teacher:
        goal = F.normalize(energy(teacher_map.detach()).flatten(1), dim=1)
        height, width = teacher_map.shape[2:]
        pooled = [pool(x, (height, width)).flatten(1) for x in energies]
        gaps.append(torch.stack([(F.normalize(x, dim=1) - goal).square().mean(dim=1) for x in pooled], dim=1))
    distance = torch.stack(gaps, dim=1)  # (B, teacher taps, student taps)
    return (attention.float() * distance).sum(dim=(1, 2)).mean()


class TapAttention(nn.Module):
    """Weigh the student's taps for every tap of one teacher, image by image.

    a[t, s] = softmax over s of (q_t . W_t k_s + p_t . p_s) / sqrt(D): the query q_t and the key k_s are linear in the
    maps averaged over their pixels, and normalised over the batch, the key followed by a ReLU; W_t k_s is normalised
    over the batch and the student's taps; p are learned positions of the taps.

    Args:
        student_channels: S of every student tap.
        teacher_channels: T of every teacher tap.
        width: D, of queries, keys and positions.
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int], width: int) -> None:
        super().__init__()
        num_student, num_teacher = len(student_channels), len(teacher_channels)
        self.queries = nn.ModuleList(
            nn.Sequential(nn.Linear(t, width, bias=False), nn.BatchNorm1d(width)) for t in teacher_channels
        )
        self.keys = nn.ModuleList(
            nn.Sequential(nn.Linear(s, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()) for s in student_channels
        )
        self.bilinear = nn.Sequential(
            nn.Linear(width, num_teacher * width, bias=False), nn.BatchNorm1d(num_teacher * width)
        )
        self.student_position = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_student, width)))
        self.teacher_position = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_teacher, width)))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the weights (B, teacher taps, student taps) of maps (B, C, H, W), one per tap."""
        pooled = [x.float().mean(dim=(2, 3)) for x in teacher]
        query = torch.stack([layer(x) for layer, x in zip(self.queries, pooled, strict=True)], dim=1)  # (B, t, D)
        pooled = [x.float().mean(dim=(2, 3)) for x in student]
        key = torch.stack([layer(x) for layer, x in zip(self.keys, pooled, strict=True)], dim=1)  # (B, s, D)
        batch, num_student, width = key.shape
        key = self.bilinear(key.flatten(0, 1)).view(batch, num_student, -1, width)  # (B, s, t, D)
        score = torch.einsum("btd,bstd->bts", query, key) + self.teacher_position @ self.student_position.T
        return torch.softmax(score / math.sqrt(width), dim=2)


class AFD(Term):
    """`afd` with one learned `TapAttention` per teacher.

    The networks may have different numbers of taps.

    Args:
        student_channels: S of every tap.
        teacher_channels: T of every tap, one list per teacher.
        hyper: the hyper-parameters, see `Term`.
        teacher_weights: see `Term`.
        values: the hyper-parameters by name.

    Raises:
        ValueError: a network has no taps, or there is no teacher.

    Reference: Ji, Heo, Park, 2021, arXiv:2102.02973, section 3.
    """

    needs = frozenset({"maps"})
    rectified = True
    paired = False
    weight = 50.0

    @dataclass(frozen=True, kw_only=True)
    class Hyper(HyperParameters):
        """Hyper-parameters of `AFD`.

        Args:
            width: length of queries, keys and positions, at least 1.
        """

        width: int = 128

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.width < 1:
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
        if not student_channels or not teacher_channels or not all(teacher_channels):
            raise ValueError(
                f"expected at least one tap of every network, and one teacher; "
                f"got {student_channels=}, {teacher_channels=}"
            )
        super().__init__(hyper, teacher_weights=per_teacher(teacher_weights, teacher_channels), **values)
        width = self.hyper.width
        self.attentions = nn.ModuleList(TapAttention(student_channels, widths, width) for widths in teacher_channels)

    @classmethod
    def make(cls, student: Probe, teachers: Sequence[Probe], num_images: int, hyper: Any) -> AFD:
        return cls(student.channels, [teacher.channels for teacher in teachers], hyper)

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        student_maps = [as_map(x) for x in student.features]
        teacher_maps = [as_map(x.detach()) for x in teacher.features]
        with torch.autocast(student.logits.device.type, enabled=False):
            return afd(student_maps, teacher_maps, self.attentions[number](student_maps, teacher_maps))
