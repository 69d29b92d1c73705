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
        ValueError: the arguments are not maps, or their numbers of images differ.
    """
    check_maps("the loss", a, b)
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    pooled = (x if x.shape[2:] == size else pool(x, size) for x in (a, b))
    first, second = pooled
    return first, second


def at_size_of(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the teacher's map at the student's resolution: averaged if its size is a multiple, else interpolated.

    Args:
        student: (B, S, H, W).
        teacher: (B, T, H', W').

    Returns:
        (B, T, H, W); the teacher's map itself if the sizes are equal. Interpolation is bilinear, with antialiasing if
        the map shrinks.
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
    """Return both maps of a tap in float32 at the same resolution, the teacher's detached; see `same_size`."""
    return same_size(as_map(student).float(), as_map(teacher.detach()).float())


def pairs(student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
    """Return the `pair` of every tap.

    Raises:
        ValueError: there are no taps, or the networks have different numbers of them.
    """
    num_student, num_teacher = len(student.features), len(teacher.features)
    if num_student != num_teacher or num_student == 0:
        raise ValueError(
            f"maps are compared tap by tap: both networks need equally many taps, at least one; got {num_student} of "
            f"the student, {num_teacher} of the teacher"
        )
    return [pair(a, b) for a, b in zip(student.features, teacher.features, strict=True)]


def check_channels(student_channels: Sequence[int], teacher_channels: Sequence[Sequence[int]]) -> None:
    """Refuse networks with different numbers of taps.

    Args:
        student_channels: S of every tap.
        teacher_channels: T of every tap, one list per teacher.

    Raises:
        ValueError: there are no teachers or no taps, or the numbers of taps differ.
    """
    lengths = [len(widths) for widths in teacher_channels]
    num_taps = len(student_channels)
    if num_taps == 0 or not lengths or set(lengths) != {num_taps}:
        raise ValueError(
            f"expected at least one teacher, and equally many taps of every network, at least one; got {num_taps} of "
            f"the student, {lengths} of the teachers"
        )


def regressor(num_student: int, num_teacher: int) -> nn.Sequential:
    """Return a 1x1 convolution to the teacher's width, and its batch normalisation."""
    return nn.Sequential(nn.Conv2d(num_student, num_teacher, 1, bias=False), nn.BatchNorm2d(num_teacher))


@torch.no_grad()
def start_from(layer: nn.Module, flow: Flow) -> None:
    """Initialise a layer with one convolution from a flow: W[t, s] = 1 if t guides s, else 0.

    In a kernel larger than 1x1, these are the weights in the middle, and the others are 0. Weights of teacher channels
    that guide no student channel do not change.

    Args:
        layer: with T output channels, and S input channels or more; weights of the additional ones become 0.
        flow: of S and T channels.

    Raises:
        ValueError: the flow is between other numbers of channels.
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
