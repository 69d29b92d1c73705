"""Two real gloo processes for terms whose value depends on the whole batch."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch import multiprocessing as mp

SPLIT = (3, 5)  # images of the two ranks: unequal on purpose

Loss = Callable[[nn.Module, slice], Tensor]


def _rank(rank: int, make: Callable[[], tuple[nn.Module, Loss]], where: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{where}/meet", rank=rank, world_size=2)
    module, loss = make()
    part = slice(0, SPLIT[0]) if rank == 0 else slice(SPLIT[0], sum(SPLIT))
    value = loss(module, part)
    value.backward()
    gradients = []
    for parameter in module.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient)
        gradients.append(gradient / 2)  # as DDP does
    torch.save((value.detach(), gradients), f"{where}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def check_two_ranks(make: Callable[[], tuple[nn.Module, Loss]]) -> None:
    """Assert that loss and gradients of two ranks are those of one process on the whole batch.

    Args:
        make: a module-level function returning a module (with fixed weights) and a function (module, images' slice) ->
            loss of those of the 8 images; the module's parameters are what gradients are compared of.
    """
    module, loss = make()
    expected = loss(copy.deepcopy(module), slice(0, sum(SPLIT)))
    alone = copy.deepcopy(module)
    loss(alone, slice(0, sum(SPLIT))).backward()
    with tempfile.TemporaryDirectory() as where:
        mp.spawn(_rank, (make, where), nprocs=2)
        for rank in (0, 1):
            value, gradients = torch.load(Path(where) / f"{rank}.pt", weights_only=True)
            torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-6)
            for parameter, gradient in zip(alone.parameters(), gradients, strict=True):
                reference = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)
