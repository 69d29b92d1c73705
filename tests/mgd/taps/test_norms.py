"""The norm in front of a tap: found by what it changes in the map, not by what stands beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mgd


class Between(nn.Module):
    """A norm, a function behind it, and a module that reads what that gives."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.seen = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Identity()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.seen(self.function(self.bn(y), y)).mean((2, 3))
        return out


KEEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nothing": lambda y, x: y,
    "a sum": lambda y, x: y + x,
    "a difference": lambda y, x: y - x.relu(),
    "a sum in place": lambda y, x: y.add_(x),
    "dropout in eval mode": lambda y, x: F.dropout(y, 0.5, training=False),
    "a copy": lambda y, x: y.clone().contiguous(memory_format=torch.channels_last),
}
CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda y, x: F.relu(y),
    "relu in place": lambda y, x: F.relu_(y),
    "a sum of relu": lambda y, x: F.relu(y) + x,
    "relu of a sum": lambda y, x: F.relu(y + 100),
    "clamp from above": lambda y, x: y.clamp(max=50),
    "leaky relu": lambda y, x: F.leaky_relu(y, 0.9),
    "hardswish": lambda y, x: F.hardswish(y),
    "silu": lambda y, x: F.silu(y),
    "tanh": lambda y, x: y.tanh(),
    "max pool": lambda y, x: F.max_pool2d(y, 2),
    "max pool of one size": lambda y, x: F.max_pool2d(y, 3, 1, 1),
    "mean over pixels": lambda y, x: F.avg_pool2d(y, 3, 1, 1),
    "a scale": lambda y, x: 0.5 * y,
    "a gate": lambda y, x: y * x.mean((2, 3), keepdim=True).sigmoid(),
    "a gate of its own": lambda y, x: y + y.mean((2, 3), keepdim=True),
    "channels in another order": lambda y, x: y.flip(1),
    "pixels in another order": lambda y, x: y.flip(2),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*KEEPS, *CHANGES])
def test_only_sums_may_lie_between_a_norm_and_its_tap(name: str, training: bool) -> None:
    net = Between({**KEEPS, **CHANGES}[name]).train(training)
    for path in ("seen@in", "seen"):
        (found,) = mgd.norms_before(mgd.Taps(net, [path]), torch.randn(1, 3, 6, 6))
        assert found is (net.bn if name in KEEPS else None), path


def test_a_black_image_is_enough() -> None:
    for name, function in {**KEEPS, **CHANGES}.items():
        net = Between(function)
        (found,) = mgd.norms_before(mgd.Taps(net, ["seen"]), torch.zeros(1, 3, 6, 6))
        assert (found is net.bn) == (name in KEEPS), name


def net_of(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_a_norm_that_activates_itself_counts_before_its_activation() -> None:
    norm = timm.layers.BatchNormAct2d(4)
    taps = mgd.Taps(net_of(norm), ["1.act@in", "1.act", "1", "1.drop@in", "0"])
    assert mgd.norms_before(taps, torch.randn(1, 3, 6, 6)) == [norm, None, None, norm, None]
    plain = timm.layers.BatchNormAct2d(4, apply_act=False)
    assert mgd.norms_before(mgd.Taps(net_of(plain), ["1"]), torch.randn(1, 3, 6, 6)) == [plain]


def test_a_norm_that_hands_other_values_to_its_module_is_none() -> None:
    class Halves(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(4)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.act(0.5 * super().forward(x))
            return out

    assert mgd.norms_before(mgd.Taps(net_of(Halves()), ["1.act@in"]), torch.randn(1, 3, 6, 6)) == [None]


def test_a_shared_norm_is_found_by_its_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.act(self.bn(self.act(self.bn(x)).relu().sqrt())).mean((2, 3))
            return out

    net = Twice()
    for call in (0, 1):
        assert mgd.norms_before(mgd.Taps(net, [f"act@in#{call}", "bn@in#0"]), torch.randn(1, 3, 6, 6)) == [net.bn, None]


def test_norms_are_found_where_no_shape_tells_the_layout() -> None:
    net = Between(KEEPS["nothing"])  # 4 channels of 4 x 4 pixels: the first forward runs at other sizes too
    assert mgd.norms_before(mgd.Taps(net, ["seen"]), torch.randn(1, 3, 4, 4)) == [net.bn]
    assert not net.bn._forward_hooks and not net.bn._forward_pre_hooks
