"""Average pooling to a size, also with deterministic algorithms on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pool(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Average maps to a size: pixel i of n is the mean of pixels floor(i H / n) to ceil((i + 1) H / n) - 1.

    On a GPU, torch's own function adds gradients in any order, so `torch.use_deterministic_algorithms` forbids it. In
    that case, the same is computed by two matrix products.

    Args:
        maps: (B, C, H, W).
        size: height and width of the result.

    Returns:
        (B, C, *size).
    """
    if maps.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return pool_by_products(maps, size)
    return F.adaptive_avg_pool2d(maps, size)


def pool_by_products(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute `pool` as rows @ maps @ columns."""
    rows, columns = (_windows(have, want, maps) for have, want in zip(maps.shape[2:], size, strict=True))
    return rows @ maps @ columns.T


def _windows(have: int, want: int, like: Tensor) -> Tensor:
    """Return the (want, have) matrix whose row i averages the pixels of window i."""
    pixel, window = torch.arange(have, device=like.device), torch.arange(want, device=like.device)[:, None]
    inside = (pixel >= window * have // want) & (pixel < -(-(window + 1) * have // want))
    return (inside / inside.sum(dim=1, keepdim=True)).to(like.dtype)
