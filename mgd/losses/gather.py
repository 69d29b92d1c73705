"""The whole batch on every rank, for terms that compare its images with each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, local: Tensor) -> Tensor:
        size = dist.get_world_size()
        counts = [torch.zeros(1, dtype=torch.int64, device=local.device) for _ in range(size)]
        dist.all_gather(counts, torch.tensor([len(local)], device=local.device))
        lengths = [int(count) for count in counts]
        padded = local.new_zeros(max(lengths), *local.shape[1:])
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(parts, padded)
        context.start, context.count = sum(lengths[: dist.get_rank()]), len(local)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)  # which is reduced in place
        dist.all_reduce(total)
        return total[context.start : context.start + context.count]


def gather(local: Tensor) -> Tensor:
    """Concatenate the ranks' tensors (B_r, ...) to (sum of B_r, ...), in the order of the ranks.

    The gradient is summed over the ranks: where every rank computes the same loss of the whole batch, and gradients of
    the weights are averaged over ranks (DDP), the result is that of one process. Without ranks it returns its argument.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return local
    gathered: Tensor = _Gather.apply(local)
    return gathered
