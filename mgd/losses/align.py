"""Bring the maps of two networks to one layout, one resolution and one width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgd.checks import check_maps
from mgd.flow import Flow
from mgd.losses.pool import pool
from mgd.taps import Outputs, as_map


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two maps to the smaller height and the smaller width of both.

    Args:
        a: (B, C, H, W).
        b: (B, D, H', W').

    Returns:
        Both maps, of height min(H, H') and width min(W, W').

    Raises:
        ValueError: no maps, or maps of another number of images.
    """
    check_maps("the loss", a, b)
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    pooled = (x if x.shape[2:] == size else pool(x, size) for x in (a, b))
    first, second = pooled
    return first, second


def at_size_of(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the teacher's map at the student's resolution: averaged where it is a multiple of it, else interpolated.

    Args:
        student: (B, S, H, W).
        teacher: (B, T, H', W').

    Returns:
        (B, T, H, W); the teacher's map itself where the sizes are equal. Interpolation is bilinear, over all pixels
        that a pixel covers where the map shrinks.
    """
    size = (student.shape[2], student.shape[3])
    own = (teacher.shape[2], teacher.shape[3])
    if own == size:
        return teacher
    if all(a % b == 0 for a, b in zip(own, size, strict=True)):
        return pool(teacher, size)
    shrinks = any(a > b for a, b in zip(own, size, strict=True))
    return F.interpolate(teacher.float(), size, mode="bilinear", antialias=shrinks).to(teacher.dtype)


def pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two maps of a tap as float32 maps of one resolution, the teacher's detached; see `same_size`."""
    return same_size(as_map(student).float(), as_map(teacher.detach()).float())


def pairs(student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
    """Return the `pair` of every tap.

    Raises:
        ValueError: no taps, or another number of them in the two networks.
    """
    num_student, num_teacher = len(student.features), len(teacher.features)
    if num_student != num_teacher or num_student == 0:
        raise ValueError(
            f"maps are compared tap by tap: both networks need equally many taps, at least one; got {num_student} of "
            f"the student, {num_teacher} of the teacher"
        )
    return [pair(a, b) for a, b in zip(student.features, teacher.features, strict=True)]


def check_channels(student_channels: Sequence[int], teacher_channels: Sequence[Sequence[int]]) -> None:
    """Refuse channel numbers that do not pair up tap by tap.

    Args:
        student_channels: one number per tap.
        teacher_channels: one such list per teacher.

    Raises:
        ValueError: no teachers, no taps, or another number of taps in one of the networks.
    """
    lengths = [len(widths) for widths in teacher_channels]
    num_taps = len(student_channels)
    if num_taps == 0 or not lengths or set(lengths) != {num_taps}:
        raise ValueError(
            f"expected at least one teacher, and equally many taps of every network, at least one; got {num_taps} of "
            f"the student, {lengths} of the teachers"
        )


def regressor(num_student: int, num_teacher: int) -> nn.Sequential:
    """Make the layer that brings the student's map to the teacher's width: a 1x1 convolution and its normalisation."""
    return nn.Sequential(nn.Conv2d(num_student, num_teacher, 1, bias=False), nn.BatchNorm2d(num_teacher))


@torch.no_grad()
def start_from(layer: nn.Module, flow: Flow) -> None:
    """Let a layer with one convolution begin with what a flow has found: W[t, s] = 1 where it pairs them, else 0.

    Of a larger kernel than 1x1 that is the middle, the rest is 0. A teacher channel that guides none keeps its weights.

    Args:
        layer: of S channels, or more, whose others get 0, and T.
        flow: of S and T channels.

    Raises:
        ValueError: a flow between other numbers of channels.
    """
    (convolution,) = (module for module in layer.modules() if isinstance(module, nn.Conv2d))
    weight, pairs = convolution.weight, torch.as_tensor(flow.matrix).T
    if pairs.shape[0] != weight.shape[0] or pairs.shape[1] > weight.shape[1]:
        raise ValueError(
            f"expected a flow between {weight.shape[1]} and {weight.shape[0]} channels; "
            f"got one between {pairs.shape[1]} and {pairs.shape[0]}"
        )
    guiding = pairs.any(dim=1).to(weight.device)
    started = torch.zeros_like(weight)
    started[:, : pairs.shape[1], weight.shape[2] // 2, weight.shape[3] // 2] = pairs.to(weight)
    weight[guiding] = started[guiding]
    if convolution.bias is not None:
        convolution.bias[guiding] = 0
