"""Cost between student and teacher channels: by the cosine of their maps, image by image, or by their correlation."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgd.checks import check_maps
from mgd.teachers import has_bfloat16

COSTS = ("cosine", "correlation")
TINY = 1e-15  # norm below which a map counts as zero: the squares of its values would lose precision


def _unit(maps: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C, H, W) -> (B * HW, C): every map of every image at unit length, zero maps at zero."""
    flat = maps.detach().permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, C)
    unit = torch.empty(flat.shape, dtype=dtype, device=maps.device)
    images = 1 if maps.device.type == "cpu" else max(1, len(flat))  # one at a time stays in a CPU's cache
    for source, target in zip(torch.split(flat, images), torch.split(unit, images), strict=True):
        source = source.float()
        norm = source.square().sum(1, keepdim=True).sqrt_()
        target.copy_(source / norm.masked_fill_(norm < TINY, 1))
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
def channel_cost(student: Tensor, teacher: Tensor, cost: str = "cosine") -> Tensor:
    """Average the cost between every student and every teacher channel over a batch.

    "cosine": cost[s, t] = mean over b of 2 - 2 <x_bs, y_bt> / (|x_bs| |y_bt|), with cosine 0 if the norm of a map is
    below 1e-15. If both maps have the same 16-bit type, they are multiplied in it; the random error, about 1e-3 per
    batch, averages out.
    "correlation": cost[s, t] = 2 - 2 corr(x_s, y_t) over all images and pixels together, with correlation 0 if a
    channel is constant. So channels are also compared by the images that they respond to.

    Args:
        student: (B, S, H, W) maps before the ReLU.
        teacher: (B, T, H, W) maps before the ReLU.
        cost: one of the two above.

    Returns:
        (S, T) float32, between 0 and 4.

    Raises:
        ValueError: batch size or resolution differ, or the cost is unknown.

    Reference: Yue, Deng, Zhou, 2020, arXiv:2008.09958, section 3.2, for "cosine".
    """
    check_maps("channel_cost", student, teacher, same="resolution")
    if cost == "cosine":
        mean: Tensor = 2 - 2 * _cosine_sum(student, teacher) / student.shape[0]
        return mean
    total = make_cost(student.shape[1], teacher.shape[1], cost).to(student.device)
    total.update(student, teacher)
    return total.mean().float()


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

    @property
    def shape(self) -> tuple[int, int]:
        """S and T."""
        return self.cosine.shape[0], self.cosine.shape[1]

    def mean(self) -> Tensor:
        """Return the (S, T) float64 cost; raise RuntimeError if no image was observed."""
        if int(self.count) == 0:
            raise RuntimeError("no images were observed: add batches of maps before matching")
        cost: Tensor = 2 - 2 * self.cosine / self.count
        return cost

    def reset(self) -> None:
        """Forget every image."""
        self.cosine.zero_()
        self.count.zero_()

    def all_reduce(self) -> None:
        """Sum over the ranks of the process group, if there is one."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.cosine)
            dist.all_reduce(self.count)


class ChannelCorrelation(nn.Module):
    """The cost "correlation" of `channel_cost` over the images of a matching pass; its sums are buffers.

    Args:
        num_student: S, student channels.
        num_teacher: T, teacher channels.
    """

    products: Tensor
    student: Tensor
    teacher: Tensor
    count: Tensor

    def __init__(self, num_student: int, num_teacher: int) -> None:
        super().__init__()
        self.register_buffer("products", torch.zeros(num_student, num_teacher, dtype=torch.float64))
        self.register_buffer("student", torch.zeros(2, num_student, dtype=torch.float64))  # sums of values, of squares
        self.register_buffer("teacher", torch.zeros(2, num_teacher, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))  # of pixels of all images

    @property
    def shape(self) -> tuple[int, int]:
        """S and T."""
        return self.products.shape[0], self.products.shape[1]

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Add a batch: (B, S, H, W) and (B, T, H, W)."""
        check_maps("channel_cost", student, teacher, same="resolution")
        if (channels := (student.shape[1], teacher.shape[1])) != self.shape:
            raise ValueError(f"expected {self.shape} channels, got {channels}")
        num_pixels = student.numel() // student.shape[1]
        parts = []
        for maps, sums in ((student, self.student), (teacher, self.teacher)):
            flat = maps.detach().float().permute(0, 2, 3, 1).flatten(0, 2)  # (B * HW, C)
            mean = flat.mean(0)
            flat = flat - mean  # smaller values have smaller rounding errors in float32
            mean = mean.double()
            sums += torch.stack([num_pixels * mean, flat.square().sum(0).double() + num_pixels * mean.square()])
            parts.append((flat, mean))
        (x, mean_x), (y, mean_y) = parts
        with torch.autocast(student.device.type, enabled=False):
            self.products += (x.T @ y).double() + num_pixels * mean_x[:, None] * mean_y
        self.count += num_pixels

    def mean(self) -> Tensor:
        """Return the (S, T) float64 cost; raise RuntimeError if no image was observed."""
        if int(self.count) == 0:
            raise RuntimeError("no images were observed: add batches of maps before matching")
        means, squares = zip(
            *((sums[0] / self.count, sums[1] / self.count) for sums in (self.student, self.teacher)), strict=True
        )
        variances = [s - m.square() for m, s in zip(means, squares, strict=True)]
        # The variance of a constant channel is only rounding errors.
        varies = [v > 1e-12 * s for v, s in zip(variances, squares, strict=True)]
        lengths = [torch.where(k, v, 1).sqrt() for v, k in zip(variances, varies, strict=True)]
        covariance = self.products / self.count - means[0][:, None] * means[1]
        correlation = covariance / lengths[0][:, None] / lengths[1]
        cost: Tensor = 2 - 2 * torch.where(varies[0][:, None] & varies[1], correlation, 0)
        return torch.where(self.products.isfinite(), cost, torch.nan)

    def reset(self) -> None:
        """Forget every image."""
        for buffer in self.buffers():
            buffer.zero_()

    def all_reduce(self) -> None:
        """Sum over the ranks of the process group, if there is one."""
        if dist.is_available() and dist.is_initialized():
            for buffer in self.buffers():
                dist.all_reduce(buffer)


def make_cost(num_student: int, num_teacher: int, cost: str = "cosine") -> ChannelCost | ChannelCorrelation:
    """Return the running mean of one of the costs of `channel_cost`.

    Raises:
        ValueError: the cost is unknown.
    """
    if cost not in COSTS:
        raise ValueError(f"unknown cost {cost!r}; choose from {', '.join(COSTS)}")
    return ChannelCost(num_student, num_teacher) if cost == "cosine" else ChannelCorrelation(num_student, num_teacher)
