from __future__ import annotations

import torch
from torch import Tensor, nn

from mgd.losses.gather import gather
from tests.mgd.losses.ranks import Loss, check_two_ranks


def make() -> tuple[nn.Module, Loss]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 4, generator=generator)
    layer = nn.Linear(4, 3)
    nn.init.constant_(layer.weight, 0.1)
    nn.init.constant_(layer.bias, 0.2)

    def loss(module: nn.Module, part: slice) -> Tensor:
        whole = gather(module(images[part]))
        return (whole - whole.mean(0)).square().sum() + whole.cumsum(0).sin().sum()

    return layer, loss


def test_two_ranks_compute_the_loss_and_gradients_of_one() -> None:
    check_two_ranks(make)


def test_without_ranks_nothing_happens() -> None:
    x = torch.randn(3, 2)
    assert gather(x) is x
