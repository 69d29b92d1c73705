"""Reduce the teacher channels that guide one student channel to one target: AMP, SP, RD, SM, weighted sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mgd.checks import check_maps, check_margin
from mgd.flow import Flow

REDUCERS = ("amp", "sp", "sp_mean", "rd", "sm", "linear")


def reduce_channels(
    teacher: Tensor,
    margin: Tensor,
    flow: Flow | Tensor,
    reducer: str = "amp",
    generator: torch.Generator | None = None,
    *,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return one target map and one margin per student channel, from the teacher channels that guide it.

    "amp": at each pixel the signed value of largest absolute value (of x and -x, x > 0); margin is the members' mean.
    "sp": the maximum of values and of margins. "sp_mean": their mean.
    "rd": at each pixel and image one random member, its value and its margin.
    "sm": the single member of a one-to-one flow.
    "linear": the sum over t of weights[s, t] teacher_t, and likewise of margins; the pairs of the flow are not used.
    `mgd.flow.group_weights` and `soft_weights` compute weights.
    Empty slots (-1) are ignored by all of them.

    Args:
        teacher: (B, T, H, W).
        margin: (T,).
        flow: `Flow`, or its index (G, S) as an int64 tensor on the teacher's device.
        reducer: one of the six above.
        generator: for "rd", on any device; None for the default one of the teacher's device.
        weights: (S, T) for "linear", at least 0, rows sum to 1; None for those of a `Flow`.

    Returns:
        Target (B, S, H, W) in the teacher's type, and margin (S,), for "rd" (B, S, H, W).

    Raises:
        ValueError: the reducer is unknown; shapes do not fit; weights are missing for "linear"; there are several
            members per channel for "sm"; or a student channel has no member, or one that does not exist (checked on the
            CPU only).

    Reference: Yue, Deng, Zhou, 2020, arXiv:2008.09958, section 3.3.
    """
    if reducer not in REDUCERS:
        raise ValueError(f"unknown reducer {reducer!r}; choose from {', '.join(REDUCERS)}")
    check_maps("reduce_channels", teacher, teacher)
    check_margin("reduce_channels", margin, teacher, per_pixel=False)
    index = torch.as_tensor(flow.index if isinstance(flow, Flow) else flow)
    _check_index(index, teacher.shape[1])
    if reducer == "linear":
        stated = flow.weights if weights is None and isinstance(flow, Flow) else weights
        return _sum(teacher, margin, stated, (index.shape[1], teacher.shape[1]))
    index = index.to(teacher.device)
    if reducer == "sm" and index.shape[0] != 1:
        raise ValueError(
            f"reducer 'sm' copies one channel; this flow has up to {index.shape[0]}: use capacity 'single'"
        )
    members = torch.where(index < 0, index[0], index)  # repeating a member does not change a maximum
    if reducer == "sm":
        return _pick(teacher, members[0]), margin[members[0]]
    if reducer == "rd":
        return _draw(teacher, margin, index, generator)
    if reducer == "sp":
        return _pool_max(teacher, members), margin[members].amax(0)
    present = (index >= 0).to(margin.dtype)
    mean_margin = torch.where(index >= 0, margin[members], 0).sum(0) / present.sum(0)
    if reducer == "amp":
        return _pool_abs_max(teacher, members), mean_margin
    return _pool_mean(teacher, members, present), mean_margin


def _check_index(index: Tensor, num_teacher: int) -> None:
    if index.ndim != 2 or index.dtype != torch.int64 or index.numel() == 0:
        raise ValueError(f"expected the index of a flow, (G, S) int64; got {tuple(index.shape)} of {index.dtype}")
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        if bool((index[0] < 0).any()):
            raise ValueError("every student channel needs a teacher channel: the flow has an empty column")
        if int(index.max()) >= num_teacher:
            raise ValueError(f"the flow names teacher channel {int(index.max())}; the maps have {num_teacher}")


def _pick(teacher: Tensor, channels: Tensor) -> Tensor:
    """Return teacher[:, channels] in the teacher's memory layout; for channels last, `index_select` would be slow."""
    if teacher.is_contiguous() or not teacher.is_contiguous(memory_format=torch.channels_last):
        return teacher.index_select(1, channels)
    rows = teacher.permute(0, 2, 3, 1)
    return rows.gather(3, channels.expand(*rows.shape[:3], -1)).permute(0, 3, 1, 2)


def _pool_abs_max(teacher: Tensor, members: Tensor) -> Tensor:
    best = _pick(teacher, members[0])
    for row in members[1:]:
        other = _pick(teacher, row)
        # The sum has the sign of the larger; on a CPU this is several times as fast as `torch.where`.
        best = torch.copysign(torch.maximum(best.abs(), other.abs()), best + other)
    return best


def _pool_max(teacher: Tensor, members: Tensor) -> Tensor:
    best = _pick(teacher, members[0])
    for row in members[1:]:
        best = torch.maximum(best, _pick(teacher, row))
    return best


def _pool_mean(teacher: Tensor, members: Tensor, present: Tensor) -> Tensor:
    share = (present / present.sum(0)).to(teacher.dtype)[:, :, None, None]  # (G, S, 1, 1)
    total = _pick(teacher, members[0]) * share[0]
    for row, part in zip(members[1:], share[1:], strict=True):
        total = total + _pick(teacher, row) * part
    return total


def _sum(teacher: Tensor, margin: Tensor, stated: Any, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    if stated is None or tuple(stated.shape) != shape:
        got = "none" if stated is None else f"weights {tuple(stated.shape)}"
        raise ValueError(f"reducer 'linear' needs weights {shape}, one row per student channel; got {got}")
    weights = torch.as_tensor(stated, device=teacher.device)
    # A weight of 0 must not make NaN of a margin of -inf.
    margins = torch.where(weights > 0, weights.to(margin.dtype) * margin, 0).sum(1)
    return F.conv2d(teacher, weights.to(teacher.dtype)[:, :, None, None]), margins


def _draw(teacher: Tensor, margin: Tensor, index: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    batch, _, height, width = teacher.shape
    count = (index >= 0).sum(0)  # (S,)
    device = teacher.device if generator is None else generator.device
    uniform = torch.rand(batch, index.shape[1], height, width, generator=generator, device=device).to(teacher.device)
    slot = (uniform * count[:, None, None]).long()  # (B, S, H, W)
    # In float32, u * count may be rounded up to count.
    slot = torch.minimum(slot, count[:, None, None] - 1)
    student = torch.arange(index.shape[1], device=index.device)[:, None, None]
    chosen = index[slot, student]  # (B, S, H, W)
    return teacher.gather(1, chosen), margin[chosen]
