"""The Gram matrix of a teacher's channels after the ReLU, summed over the images of a matching pass."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgd.checks import check_maps


class ChannelGram(nn.Module):
    """Sum over images and pixels of max(x_t, 0) max(x_u, 0), kept in buffers.

    Args:
        num_teacher: T, teacher channels.
    """

    matrix: Tensor
    count: Tensor

    def __init__(self, num_teacher: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.zeros(num_teacher, num_teacher, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, teacher: Tensor) -> None:
        """Add a batch (B, T, H, W) of maps before the ReLU; raise ValueError for another number of channels."""
        check_maps("ChannelGram.update", teacher, teacher)
        if teacher.shape[1] != len(self.matrix):
            raise ValueError(f"expected {len(self.matrix)} channels, got {teacher.shape[1]}")
        flat = teacher.detach().clamp_min(0).float().permute(0, 2, 3, 1).flatten(0, 2)  # (B * HW, T)
        with torch.autocast(teacher.device.type, enabled=False):
            self.matrix += flat.T @ flat
        self.count += len(teacher)

    def mean(self) -> Tensor:
        """Return the (T, T) float64 mean over images; raise RuntimeError if no image was observed."""
        if int(self.count) == 0:
            raise RuntimeError("no images were observed: add batches of maps before matching")
        return self.matrix / self.count

    def reset(self) -> None:
        """Forget every image."""
        self.matrix.zero_()
        self.count.zero_()

    def all_reduce(self) -> None:
        """Sum over the ranks of the process group, if there is one."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.matrix)
            dist.all_reduce(self.count)
