"""What ranks give each other: the whole batch, for terms that compare its images, and what the first rank found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Found = TypeVar("Found")


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
        total = gradients[0].clone(memory_format=torch.contiguous_format)  # which is reduced in place
        dist.all_reduce(total)
        return total[context.start : context.start + context.count], None


def _counts(local: Tensor) -> list[int]:
    """Ask every rank how many images it has; reading the answer waits for a GPU."""
    counts = [torch.zeros(1, dtype=torch.int64, device=local.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(local)], device=local.device))
    return [int(count) for count in counts]


def among_ranks() -> bool:
    """Return whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather(local: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Concatenate the ranks' tensors (B_r, ...) to (sum of B_r, ...), in the order of the ranks.

    The gradient is summed over the ranks: where every rank computes the same loss of the whole batch, and gradients of
    the weights are averaged over ranks (DDP), the result is that of one process. Without ranks it returns its argument.

    Args:
        local: (B_r, ...), of this rank.
        counts: B_r of every rank, see `Batch.counts`; None to ask, which makes the processor wait for a GPU.

    Raises:
        ValueError: counts of other ranks or images than there are.
    """
    if not among_ranks():
        return local
    gathered: Tensor = _Gather.apply(local, counts)
    return gathered


def first_rank(found: Found) -> Found:
    """Return what the first rank passed, on every rank; without ranks its argument.

    For what ranks compute from the same numbers and may find another way: processors round in different ways, and where
    two solutions cost the same, a solver may take either.

    Args:
        found: what this rank found; it can be pickled.
    """
    if not among_ranks():
        return found
    box = [found]
    dist.broadcast_object_list(box, src=0)
    return box[0]
