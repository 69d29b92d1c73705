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


def make_shared() -> tuple[nn.Module, Loss]:
    layer, _ = make()

    def loss(module: nn.Module, part: slice) -> Tensor:
        assert isinstance(module, nn.Linear)
        images = torch.ones(8, 4)[part]
        local, whole = module.weight * 1, gather(images @ module.weight.T)
        same = gather(local[None, :, :1].expand(len(images), -1, -1).squeeze(-1))
        return whole.sum() + same.sum()  # both get one tensor of ones as their gradient

    return layer, loss


def test_two_ranks_compute_the_loss_and_gradients_of_one() -> None:
    check_two_ranks(make)


def test_a_gradient_that_others_use_too_is_left_as_it_is() -> None:
    check_two_ranks(make_shared)


def test_without_ranks_nothing_happens() -> None:
    x = torch.randn(3, 2)
    assert gather(x) is x
