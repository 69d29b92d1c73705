"""One pair of taps of a matching: its adapter, cost sums, margin and flow."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgd.flow import ChannelCost
from mgd.losses.margin import MeasuredMargin


class Stage(nn.Module):
    """One pair of taps of `ChannelMatching`.

    Args:
        num_student: S, student channels.
        num_teacher: T, teacher channels.
        margin: (T,), or None where it is measured on the map.
        depth: G, the most teacher channels per student channel.

    Raises:
        ValueError: a margin of another length.
    """

    index: Tensor
    margin: Tensor
    total_cost: Tensor
    peak: Tensor

    def __init__(self, num_student: int, num_teacher: int, margin: Tensor | None, depth: int) -> None:
        super().__init__()
        self.adapter = nn.BatchNorm2d(num_student)
        self.cost = ChannelCost(num_student, num_teacher)
        self.measured = MeasuredMargin(num_teacher) if margin is None else None
        margin = torch.zeros(num_teacher) if margin is None else margin.detach().clone().float()
        if margin.shape != (num_teacher,):
            raise ValueError(f"expected {num_teacher} margins, one per teacher channel; got {tuple(margin.shape)}")
        self.register_buffer("margin", margin)
        self.register_buffer("index", torch.full((depth, num_student), -1, dtype=torch.int64))
        self.register_buffer("total_cost", torch.zeros((), dtype=torch.float64))
        # The largest value of the teacher's map that was observed.
        self.register_buffer("peak", torch.tensor(-torch.inf), persistent=False)

    @property
    def num_teacher(self) -> int:
        return self.margin.numel()

    def sums(self) -> list[ChannelCost | MeasuredMargin]:
        """What a matching pass accumulates."""
        return [self.cost] if self.measured is None else [self.cost, self.measured]

    def all_reduce(self) -> None:
        """Join what all ranks have observed."""
        for total in self.sums():
            total.all_reduce()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.peak, dist.ReduceOp.MAX)
