"""Cost between student and teacher channels: 2 - 2 cos of their flattened maps, averaged over images."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgd.checks import check_maps
from mgd.teachers import has_bfloat16

TINY = 1e-15  # length below which a map counts as all zero: squares of its values lose their digits


def _unit(maps: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C, H, W) -> (B * HW, C): every map of every image at unit length, zero maps at zero."""
    flat = maps.detach().permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, C)
    unit = torch.empty(flat.shape, dtype=dtype, device=maps.device)
    images = 1 if maps.device.type == "cpu" else max(1, len(flat))  # a single one stays in a processor's cache
    for source, goal in zip(torch.split(flat, images), torch.split(unit, images), strict=True):
        source = source.float()
        norm = source.square().sum(1, keepdim=True).sqrt_()
        goal.copy_(source / norm.masked_fill_(norm < TINY, 1))
    return unit.flatten(0, 1)


def _cosine_sum(student: Tensor, teacher: Tensor) -> Tensor:
    """(B, S, H, W), (B, T, H, W) -> (S, T): cosines summed over the batch."""
    check_maps("channel_cost", student, teacher, same="resolution")
    dtype = student.dtype if student.dtype == teacher.dtype else torch.float32
    if dtype == torch.bfloat16 and not has_bfloat16(student.device):
        dtype = torch.float32  # emulated products take many times as long
    # One product over images and pixels together sums the per-image cosines.
    with torch.autocast(student.device.type, enabled=False):
        return (_unit(student, dtype).T @ _unit(teacher, dtype)).float()


@torch.no_grad()
def channel_cost(student: Tensor, teacher: Tensor) -> Tensor:
    """Average the cost between every student and every teacher channel over a batch.

    cost[s, t] = mean over b of 2 - 2 <x_bs, y_bt> / (|x_bs| |y_bt|), with cos 0 where a map is all zero,
    or shorter than 1e-15. Maps that are both of one 16-bit type are multiplied in it: a random error of about 1e-3 a
    batch, which averages out.

    Args:
        student: (B, S, H, W) maps before the ReLU.
        teacher: (B, T, H, W) maps before the ReLU.

    Returns:
        (S, T) float32, between 0 and 4.

    Raises:
        ValueError: batch or resolution differ.

    Reference: Yue, Deng, Zhou, 2020, arXiv:2008.09958, section 3.2.
    """
    cost: Tensor = 2 - 2 * _cosine_sum(student, teacher) / student.shape[0]
    return cost


class ChannelCost(nn.Module):
    """Running mean of `channel_cost` over the images of a matching pass, kept in buffers.

    Args:
        num_student: S, student channels.
        num_teacher: T, teacher channels.
    """

    cosine: Tensor
    count: Tensor

    def __init__(self, num_student: int, num_teacher: int) -> None:
        super().__init__()
        self.register_buffer("cosine", torch.zeros(num_student, num_teacher, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Add a batch: (B, S, H, W) and (B, T, H, W)."""
        total = _cosine_sum(student, teacher)
        if total.shape != self.cosine.shape:
            raise ValueError(f"expected {tuple(self.cosine.shape)} channels, got {tuple(total.shape)}")
        self.cosine += total
        self.count += student.shape[0]

    def mean(self) -> Tensor:
        """Return the (S, T) float64 cost; raise RuntimeError where no image was seen."""
        if int(self.count) == 0:
            raise RuntimeError("no images were observed: add batches of maps before matching")
        cost: Tensor = 2 - 2 * self.cosine / self.count
        return cost

    def reset(self) -> None:
        """Forget every image."""
        self.cosine.zero_()
        self.count.zero_()

    def all_reduce(self) -> None:
        """Sum over the ranks of the process group, where there is one."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.cosine)
            dist.all_reduce(self.count)
