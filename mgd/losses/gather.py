"""Exchange between ranks: the global batch, for terms that compare its images, and results of the first rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, local: Tensor, counts: Sequence[int] | None) -> Tensor:
        counts = _counts(local) if counts is None else counts
        rank = dist.get_rank()
        if len(counts) != dist.get_world_size() or counts[rank] != len(local):
            raise ValueError(f"rank {rank} has {len(local)} images; the counts of the ranks are {list(counts)}")
        padded = local.new_zeros(max(counts), *local.shape[1:])
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        context.start, context.count = sum(counts[:rank]), len(local)
        return torch.cat([part[:length] for part, length in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)  # `all_reduce` works in place
        dist.all_reduce(total)
        return total[context.start : context.start + context.count], None


def _counts(local: Tensor) -> list[int]:
    """Return the number of images of every rank; reading the numbers waits for a GPU."""
    counts = [torch.zeros(1, dtype=torch.int64, device=local.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(local)], device=local.device))
    return [int(count) for count in counts]


def among_ranks() -> bool:
    """Return whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather(local: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Concatenate the ranks' tensors (B_r, ...) to (sum of B_r, ...), in the order of the ranks.

    The gradient is summed over the ranks. If every rank computes the same loss of the global batch, and gradients of
    the weights are averaged over ranks (DDP), the result equals that of one process. A single rank gets `local` itself.

    Args:
        local: (B_r, ...), of this rank.
        counts: B_r of every rank, see `Batch.counts`; None to exchange them, which waits for a GPU.

    Raises:
        ValueError: the counts do not fit the ranks and their images.
    """
    if not among_ranks():
        return local
    gathered: Tensor = _Gather.apply(local, counts)
    return gathered


def first_rank(value: T) -> T:
    """Return the first rank's value on every rank.

    For results that may differ although all ranks compute them from the same numbers: CPUs round differently, and a
    solver may return either of two solutions of equal cost.

    Args:
        value: of this rank; it must allow pickling.
    """
    if not among_ranks():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
