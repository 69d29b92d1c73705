"""Taps of networks as people write them: activations written out, tiny tokens, branches that meet late, odd names."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mgd
from mgd import Taps, describe_taps, find_taps
from mgd.taps.changed import run_changed


def conv(ins: int, outs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, 3, stride, 1)


def head() -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


class Written(nn.Module):
    """A convolution, a norm and an activation that is a function of tensors."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.after, self.head = conv(3, 4, 2), nn.BatchNorm2d(4), nn.Identity(), nn.Linear(4, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.after(self.function(self.norm(self.conv(x)))).mean((2, 3)))
        return out


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: x * F.relu6(x + 3) / 6, "Hardswish"),
        (lambda x: x * (F.relu6(x + 3) / 6), "Hardswish"),
        (lambda x: F.hardsigmoid(x) * x, "Hardswish"),
        (lambda x: x * torch.clamp(x + 3, 0, 6) / 6, "Hardswish"),
        (lambda x: x * torch.tanh(F.softplus(x)), "Mish"),
        (lambda x: x * torch.sigmoid(1.702 * x), "GELU"),
        (lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), "GELU"),
        (lambda x: x * torch.sigmoid(x), "SiLU"),
        (lambda x: x * (x > 0), "ReLU"),
        (lambda x: torch.maximum(x, torch.zeros_like(x)), "ReLU"),
        (lambda x: torch.where(x > 0, x, torch.zeros_like(x)), "ReLU"),
        (lambda x: x.masked_fill(x < 0, 0), "ReLU"),
        (lambda x: F.threshold(x, 0, 0), "ReLU"),
        (lambda x: x.clamp(0, 6), "ReLU6"),
        (torch.tanh, "Tanh"),
    ],
)
def test_an_activation_that_is_written_out_is_seen(function: Callable[[Tensor], Tensor], name: str) -> None:
    (tap,) = find_taps(Written(function), 16)
    margin = {"ReLU": "norm", "ReLU6": "norm", "Tanh": "none"}.get(name, "measured")
    assert (tap.path, tap.norm, tap.activation, tap.margin) == ("norm", "norm", name, margin)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),  # a gate of another value
        lambda x: x * torch.sigmoid(x.flip(3)),
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: torch.where(x > 1, x, torch.zeros_like(x)),
        lambda x: x.masked_fill(x < 0, 1),
        lambda x: x + torch.sigmoid(x),
    ],
)
def test_what_only_looks_like_an_activation_is_none(function: Callable[[Tensor], Tensor]) -> None:
    (tap,) = find_taps(Written(function), 16)
    assert tap.path == "after" and tap.activation is None
    assert [given.activation for given in describe_taps(Written(function), ["norm"], 16)] == [None]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mix(self.norm(x)) + x.mean(1, keepdim=True)
        return out


class Tokens(nn.Module):
    """A transformer of as many channels as tokens: no shape tells them apart, and no other size of images runs."""

    def __init__(self, width: int, prefix: int) -> None:
        super().__init__()
        self.patch, self.cls_token = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.randn(1, prefix, width))
        self.place = nn.Parameter(torch.randn(1, 16, width))
        self.blocks, self.head = nn.Sequential(*(Block(width) for _ in range(4))), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        out: Tensor = self.head(self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)).mean(1))
        return out


BLOCKS = ("blocks.0", "blocks.1", "blocks.2", "blocks")


@pytest.mark.parametrize("width", [16, 4])  # as many as tokens, or as half of both sides would leave
@pytest.mark.parametrize("prefix", [1, 2])
def test_tokens_that_are_as_many_as_channels_are_told_by_their_norm(width: int, prefix: int) -> None:
    taps = find_taps(Tokens(width, prefix), 16)
    assert [tap.path for tap in taps] == [f"{name}@tokens:prefix={prefix}" for name in BLOCKS]
    assert {(tap.channels, tap.size) for tap in taps} == {(width, (4, 4))}


def test_channels_in_front_of_as_many_positions_are_no_tokens() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.mix, self.head = nn.Conv2d(3, 16, 4, 4), nn.Conv1d(16, 16, 1), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch(x).flatten(2)
            out: Tensor = self.head((x + self.mix(x)).mean(2))
            return out

    assert [tap.path for tap in find_taps(First(), 16)] == ["patch"]


class Late(nn.Module):
    """Branches of three resolutions that meet in the largest one, or behind their pools."""

    def __init__(self, upsamples: bool) -> None:
        super().__init__()
        self.one, self.two, self.three = conv(3, 4, 2), conv(4, 6, 2), conv(6, 8, 2)
        self.deep, self.fuse, self.upsamples = conv(8, 8), nn.Conv2d(18, 18, 1), upsamples
        self.head = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(one.relu())
        three = self.deep(self.three(two.relu()).relu())
        if self.upsamples:
            maps = [F.interpolate(value.relu(), one.shape[2:]) for value in (one, two, three)]
            pooled = self.fuse(torch.cat(maps, 1)).relu().mean((2, 3))
        else:
            pooled = torch.cat([value.relu().mean((2, 3)) for value in (one, two, three)], 1)
        out: Tensor = self.head(pooled)
        return out


def test_branches_that_meet_late_are_tapped_at_each_resolution() -> None:
    assert [(tap.path, tap.size) for tap in find_taps(Late(True), 32)] == [
        ("fuse", (16, 16)), ("two", (8, 8)), ("deep", (4, 4))
    ]  # fmt: skip
    assert [(tap.path, tap.size) for tap in find_taps(Late(False), 32)] == [
        ("one", (16, 16)), ("two", (8, 8)), ("deep", (4, 4))
    ]  # fmt: skip


def test_two_networks_side_by_side_are_tapped_in_one() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (nn.Sequential(conv(3, 4, 2), nn.ReLU(), conv(4, 6, 2)) for _ in range(2))
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(torch.cat([side(x).mean((2, 3)) for side in (self.left, self.right)], 1))
            return out

    assert [tap.path for tap in find_taps(Both(), 16)] == ["right.0", "right"]


def test_a_convolution_that_halves_a_map_ends_a_stage_of_its_own() -> None:
    model = nn.Sequential(conv(3, 4, 2), nn.ReLU(), conv(4, 6, 2), nn.ReLU(), conv(6, 8, 2), head())
    assert [(tap.path, tap.size) for tap in find_taps(model, 32)] == [
        ("0", (16, 16)), ("2", (8, 8)), ("4", (4, 4))
    ]  # fmt: skip


def test_layers_in_a_row_are_tapped_before_their_activations() -> None:
    layers = [layer for n in range(6) for layer in (conv(4 if n else 3, 4), nn.BatchNorm2d(4), nn.ReLU())]
    model = nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    taps = find_taps(model, 8)
    assert [(tap.path, tap.activation) for tap in taps] == [(f"0.{n}", "ReLU") for n in (4, 7, 13, 16)]


Pair = namedtuple("Pair", ["early", "late"])


class Returns(nn.Module):
    """A network whose stage returns its map inside another object, from which `unwrap` takes what the head reads."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any], unwrap: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.stage, self.head, self.unwrap = Stage(wrap), nn.Linear(4, 3), unwrap

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.unwrap(self.stage(x)))
        return out


class Stage(nn.Module):
    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.wrap = conv(3, 4, 2), wrap

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.wrap(y, y.mean((2, 3)))


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda y, pooled: {"last": y, "pooled": pooled}, lambda out: out["pooled"]),
        (lambda y, pooled: (y, pooled), lambda out: out[1]),
        (lambda y, pooled: {"a.b[0]": y, "@": pooled}, lambda out: out["a.b[0]"].mean((2, 3))),
    ],
)
def test_a_map_is_read_where_all_that_follows_is_still_to_come(
    wrap: Callable[[Tensor, Tensor], Any], unwrap: Callable[[Any], Tensor]
) -> None:
    model, images = Returns(wrap, unwrap).eval(), torch.randn(2, 3, 16, 16)
    (tap,) = find_taps(model, 16)
    assert tap.path == "stage.conv"
    torch.testing.assert_close(run_changed(model, tap.path, images, lambda maps: maps.flip(0)), model(images).flip(0))


def test_an_element_of_a_named_tuple_can_be_another() -> None:
    model, images = Returns(Pair, lambda out: out.early.mean((2, 3))).eval(), torch.randn(2, 3, 16, 16)
    swapped = run_changed(model, "stage[0]", images, lambda maps: maps.flip(0))
    torch.testing.assert_close(swapped, model(images).flip(0))


def test_random_numbers_and_buffers_are_left_as_they_were() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = conv(3, 4, 2), nn.Linear(4, 3)
            self.register_buffer("calls", torch.zeros(()))
            self.calls: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            out: Tensor = self.head(F.dropout(self.conv(x)).mean((2, 3)))
            return out

    model, before = Draws(), torch.get_rng_state()
    mgd.pair_taps(model, model, 16)
    mgd.describe_taps(model, ["conv"], 16)
    mgd.probe(Taps(model, ["conv"]), torch.zeros(2, 3, 16, 16))
    assert float(model.calls) == 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("channels", [1, 4])
def test_made_images_have_the_channels_that_the_network_reads(channels: int) -> None:
    model = nn.Sequential(conv(channels, 4, 2), nn.ReLU(), conv(4, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert [tap.path for tap in find_taps(model, 16)] == ["0", "2"]


@pytest.mark.parametrize("size", ["32", 0, -1, (32,), (32.0, 32), None, torch.zeros(3, 8, 8)])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\), or height and width"):
        find_taps(conv(3, 4), size)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_map_without_a_graph_teaches_nothing(reentrant: bool) -> None:
    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = conv(3, 4, 2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.conv, x, use_reentrant=reentrant)
            out: Tensor = self.head(x.mean((2, 3)))
            return out

    model, images = Saving(), torch.randn(2, 3, 16, 16, requires_grad=True)
    taps = Taps(model, [tap.path for tap in find_taps(model, 16)])
    mgd.dry_forward(taps, images)
    if reentrant:
        with pytest.raises(ValueError, match="'conv' lies in a part of the network that runs without gradients"):
            taps(images)
    else:
        taps(images).features[0].sum().backward()
        assert model.conv.weight.grad is not None and model.conv.weight.grad.abs().sum() > 0


def test_a_map_with_padding_around_it_is_no_map() -> None:
    layers: list[nn.Module] = [conv(3, 4, 2), nn.ReLU()]
    for width in (4, 6, 8):  # as TensorFlow's convolutions do it; 8 x 8 becomes 11 x 11
        layers += [conv(width if width > 4 else 4, width), nn.ReLU(), nn.ZeroPad2d((1, 2, 1, 2))]
        layers += [nn.Conv2d(width, min(width + 2, 8), 5, 2), nn.ReLU()]
    taps = find_taps(nn.Sequential(*layers, head()), 32)
    assert [(tap.path, tap.size[0]) for tap in taps] == [("2", 16), ("7", 8), ("12", 4), ("15", 2)]


def test_a_norm_over_several_processes_is_a_batch_norm() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Written(torch.relu))
    (tap,) = find_taps(model, 16)
    assert (tap.path, tap.norm, tap.activation, tap.margin) == ("norm", "norm", "ReLU", "norm")
    own, other = (
        mgd.probe(Taps(net, ["norm"]), torch.zeros(2, 3, 16, 16)).margins[0] for net in (model, Written(F.relu))
    )
    assert own is not None and other is not None and torch.equal(own, other)


@pytest.mark.parametrize("grid", [4, (4,), "4x4", (2, 2, 4)])
def test_a_grid_is_two_numbers(grid: Any) -> None:
    with pytest.raises(ValueError, match="grid must be rows and columns"):
        mgd.tokens_to_map(torch.zeros(1, 16, 2), grid=grid)
