"""Taps that find themselves: the hard cases as nets of ten lines, and networks whose maps are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

import mgd
from mgd import Tap, find_taps
from mgd.taps import table
from mgd.taps.changed import matters, run_changed


def conv(ins: int, outs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, 3, stride, 1)


def head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def found(model: nn.Module, size: Any = 16) -> list[tuple[str, int, tuple[int, int]]]:
    """What is found, after a look that `Taps` reads what the records say."""
    taps = find_taps(model, size)
    sides = (size, size) if isinstance(size, int) else size
    reader = mgd.Taps(model, [tap.path for tap in taps])
    maps = mgd.dry_forward(reader, torch.randn(3, 3, *sides)).features
    reader.close()
    assert [tuple(m.shape) for m in maps] == [(3, tap.channels, *tap.size) for tap in taps]
    assert [tap.depth for tap in taps] == sorted(tap.depth for tap in taps)
    return [(tap.path, tap.channels, tap.size) for tap in taps]


def judged(model: nn.Module, size: int = 16) -> list[tuple[str | None, str | None, str]]:
    return [(tap.norm, tap.activation, tap.margin) for tap in find_taps(model, size)]


class Residual(nn.Module):
    """Two stages of a residual block with a shared activation that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0, self.relu = conv(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(4, 4), nn.BatchNorm2d(4), conv(4, 4), nn.BatchNorm2d(4)
        self.down, self.bn3, self.head = conv(4, 6, 2), nn.BatchNorm2d(6), head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn0(self.stem(x)))
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        out: Tensor = self.head(self.relu(self.bn3(self.down(self.relu(y)))))
        return out


def test_a_stage_ends_with_the_sum_before_its_activation_not_in_a_branch() -> None:
    model = Residual()
    assert found(model) == [("relu@in#2", 4, (8, 8)), ("bn3", 6, (4, 4))]
    assert judged(model) == [("bn2", "ReLU", "norm"), ("bn3", "ReLU", "norm")]


def test_the_network_is_left_as_it_was() -> None:
    model = Residual().train()
    model.bn1.eval()
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    find_taps(model, 16)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.relu.inplace and model.training and model.bn2.training and not model.bn1.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        find_taps(nn.Sequential(model, nn.Linear(7, 1)), 16)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("activation", "name", "margin"),
    [
        (nn.ReLU(inplace=True), "ReLU", "norm"),
        (nn.ReLU6(), "ReLU6", "norm"),
        (nn.SiLU(inplace=True), "SiLU", "measured"),
        (nn.GELU(), "GELU", "measured"),
        (nn.Hardswish(inplace=True), "Hardswish", "measured"),
        (nn.LeakyReLU(0.1), "LeakyReLU", "none"),
        (nn.PReLU(5), "PReLU", "none"),
        (nn.Identity(), None, "none"),
    ],
)
def test_an_activation_says_where_a_margin_comes_from(activation: nn.Module, name: str | None, margin: str) -> None:
    model = nn.Sequential(conv(3, 5), nn.BatchNorm2d(5), activation, conv(5, 6, 2), nn.BatchNorm2d(6), head(6))
    assert judged(model)[0] == ("1", name, margin)


def test_swish_by_hand_is_seen_and_a_gate_is_none() -> None:
    class Gate(nn.Module):
        def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.conv, self.bn, self.next, self.head = conv(3, 5), nn.BatchNorm2d(5), conv(5, 6, 2), head(6)
            self.gate = gate

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.conv(x))
            out: Tensor = self.head(self.next(x * self.gate(x)))
            return out

    assert judged(Gate(torch.sigmoid))[0] == ("bn", "SiLU", "measured")
    assert judged(Gate(lambda x: x.mean((2, 3), keepdim=True).sigmoid()))[0][1:] == (None, "none")


@pytest.mark.parametrize(
    ("norm", "path", "expected"),
    [
        (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), "1.0", ("1.0", "ReLU", "norm")),
        (BatchNormAct2d(4), "1.act@in", ("1", "ReLU", "norm")),
        (nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU()), "1.0", (None, "ReLU", "measured")),
        (nn.Sequential(timm.layers.LayerNorm2d(4), nn.GELU()), "1.0", (None, "GELU", "measured")),
        (nn.ReLU(), "0", (None, "ReLU", "measured")),
    ],
)
def test_a_map_is_read_behind_its_norm(norm: nn.Module, path: str, expected: Any) -> None:
    model = nn.Sequential(conv(3, 4), norm, conv(4, 6, 2), head(6))
    assert found(model)[0] == (path, 4, (16, 16))
    assert judged(model)[0] == expected


def test_a_pre_activation_net_is_read_at_the_norm_that_all_passes() -> None:
    class Block(nn.Module):
        def __init__(self, ins: int, outs: int) -> None:
            super().__init__()
            self.bn, self.conv, self.short = nn.BatchNorm2d(ins), conv(ins, outs, 2), nn.Conv2d(ins, outs, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn(x))
            out: Tensor = self.conv(x) + self.short(x)
            return out

    model = nn.Sequential(conv(3, 4), Block(4, 6), Block(6, 8), head(8))
    assert found(model) == [("1.bn", 4, (16, 16)), ("2.bn", 6, (8, 8)), ("2", 8, (4, 4))]
    assert judged(model) == [("1.bn", "ReLU", "norm"), ("2.bn", "ReLU", "norm"), (None, None, "none")]


def test_what_a_transition_averages_is_read_before_its_activation() -> None:
    transition = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.AvgPool2d(2))
    model = nn.Sequential(conv(3, 4), transition, conv(2, 5), nn.BatchNorm2d(5), nn.ReLU(), head(5))
    assert found(model) == [("1.0", 4, (16, 16)), ("3", 5, (8, 8))]


class Last(nn.Module):
    """A patch embedding, then layers on maps with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.mlp = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8), nn.Linear(8, 8)
        self.merge, self.fc = nn.Linear(32, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        x = x + self.mlp(self.norm(x))
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        out: Tensor = self.fc(self.merge(x).mean((1, 2)))
        return out


def test_channels_last_are_read_as_such() -> None:
    assert found(Last()) == [("norm@in@last", 8, (8, 8)), ("merge@last", 6, (4, 4))]
    assert found(Last(), (16, 24)) == [("norm@in@last", 8, (8, 12)), ("merge@last", 6, (4, 6))]


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc(self.norm(x)) + x.mean(1, keepdim=True)
        return out


class Tokens(nn.Module):
    """A small transformer; its logits are those of the class token where there is one."""

    def __init__(self, prefix: int = 1, say: bool = True, num: int = 8) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Conv2d(3, 6, 4, 4), nn.Sequential(*[Mix() for _ in range(num)])
        self.fc = nn.Linear(6, 3)
        front = nn.Parameter(torch.randn(1, prefix, 6))
        self.register_parameter("cls_token" if say else "front", front if prefix else None)
        self.prefix = prefix

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for parameter in self._parameters.values():
            x = x if parameter is None else torch.cat([parameter.expand(len(x), -1, -1), x], 1)
        x = self.blocks(x)
        out: Tensor = self.fc(x[:, 0] if self.prefix else x.mean(1))
        return out


def test_a_plain_transformer_is_read_over_its_depth() -> None:
    paths = [path for path, _, _ in found(Tokens(0), 16)]
    assert paths == ["blocks.1@tokens", "blocks.3@tokens", "blocks.5@tokens", "blocks@tokens"]
    # Behind the last block the logits read the class token alone.
    assert found(Tokens(1), 16) == [(f"blocks.{n}@tokens:prefix=1", 6, (4, 4)) for n in (1, 3, 5, 6)]
    assert found(Tokens(1), (8, 20))[0] == ("blocks.1@tokens:prefix=1:grid=2x5", 6, (2, 5))
    assert {tap.kind for tap in find_taps(Tokens(5), 16)} == {"tokens"}
    assert found(Tokens(5), 16)[0][0] == "blocks.1@tokens:prefix=5"


def test_tokens_that_nothing_tells_are_not_read() -> None:
    assert [path for path, _, _ in found(Tokens(1, say=False), 16)] == ["embed"]
    model = Tokens(0)
    model.unroll = nn.Identity()  # as Hiera, it says that its tokens are in another order
    assert [path for path, _, _ in found(model, 16)] == ["embed"]
    with pytest.raises(ValueError, match="found no place to tap"):
        find_taps(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), 4)


class Several(nn.Module):
    """Modules that return a tuple and a mapping, are called twice, and by keyword."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv(3, 4, 2)

        def forward(self, scale: float, x: Tensor) -> tuple[int, Tensor]:
            return 0, F.relu(self.a(x)) * scale

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = conv(4, 4, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"mean": x.mean(), "map": self.b(x) + 1}

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.named, self.twice, self.head = self.Pair(), self.Named(), conv(4, 4, 2), head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.named(x=self.pair(scale=2.0, x=x)[1])["map"]
        out: Tensor = self.head(self.twice(self.twice(x)))
        return out


def test_elements_calls_and_keywords() -> None:
    assert found(Several(), 32) == [
        ("pair[1]", 4, (16, 16)),
        ("named[map]", 4, (8, 8)),
        ("twice#0", 4, (4, 4)),
        ("head@in", 4, (2, 2)),  # also what the second call returns
    ]
    with pytest.raises(ValueError, match="no such element, but mean, map"):
        mgd.Taps(Several(), ["named[maps]"])(torch.randn(1, 3, 32, 32))
    with pytest.raises(TypeError, match=r"leave out \[0\]"):
        mgd.Taps(Several(), ["twice[0]#0"])(torch.randn(1, 3, 32, 32))


def test_what_is_changed_by_a_view_is_another_map() -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.next, self.head = conv(3, 4), conv(4, 4, 2), head(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y[:, :2] = y[:, :2].relu()
            out: Tensor = self.head(self.next(y))
            return out

    model, images = Partial().eval(), torch.randn(2, 3, 16, 16)
    assert found(model) == [("next@in", 4, (16, 16)), ("next", 4, (8, 8))]
    swapped = run_changed(model, "next@in", images, lambda maps: maps.flip(0))
    torch.testing.assert_close(swapped, model(images).flip(0))


def test_resolutions_that_only_branches_have_are_found() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two, self.deep = conv(3, 4), conv(4, 4, 2), conv(4, 4, 2), conv(4, 4, 2)
            self.short, self.head = nn.Conv2d(4, 4, 1, 4), head(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.one(x) + self.two(x)
            out: Tensor = self.head(self.deep(y) + self.short(x))
            return out

    assert found(Branches()) == [("stem", 4, (16, 16)), ("deep@in", 4, (8, 8)), ("head@in", 4, (4, 4))]


def test_a_replaced_map_matters_where_the_logits_are_made_of_it() -> None:
    model, images = Residual().eval(), torch.randn(2, 3, 16, 16)
    for path in ("relu@in#2", "relu@in#-2", "bn3", "down@in"):
        assert torch.equal(run_changed(model, path, images, torch.clone), model(images)), path
        swapped = run_changed(model, path, images, lambda maps: maps.flip(0))
        torch.testing.assert_close(swapped, model(images).flip(0))  # all passes there
    branch = run_changed(model, "bn1", images, lambda maps: maps.flip(0))
    assert not torch.allclose(branch, model(images).flip(0))
    assert matters(Tokens(1), "blocks.6@tokens:prefix=1", images)
    assert not matters(Tokens(1), "blocks.7@tokens:prefix=1", images)


RESNET18 = [("bn1", 64, 16), *[(f"layer{n}.1.relu@in#1", 32 * 2**n, 2 ** (4 - n)) for n in (1, 2, 3)]]


@pytest.mark.parametrize(
    ("build", "size", "first"),
    [
        (lambda: torchvision.models.resnet18(), 32, RESNET18),
        (lambda: torchvision.models.get_model("mobilenet_v2"), 32, [("features.2.conv.0.1", 96, 16)]),
        (lambda: timm.create_model("repvgg_a0"), 32, [("stem.act@in", 48, 16), ("stages.0.1.act@in", 48, 8)]),
        (lambda: timm.create_model("convnext_atto"), 64, [("stages.1.downsample.0", 40, 16)]),
        (lambda: timm.create_model("mobilenetv3_small_050"), 32, [("bn1.act@in", 16, 16)]),
        (lambda: timm.create_model("swin_s3_tiny_224", img_size=64), 64, [("layers.0@last", 96, 16)]),
    ],
)
def test_real_networks(build: Callable[[], nn.Module], size: int, first: list[tuple[str, int, int]]) -> None:
    taps = found(build(), size)
    assert taps[: len(first)] == [(path, channels, (side, side)) for path, channels, side in first]


def test_given_taps_are_described_as_found_ones() -> None:
    model = torchvision.models.resnet18()
    taps = find_taps(model, 64)
    assert mgd.describe_taps(model, [tap.path for tap in taps], 64) == taps
    (tap,) = mgd.describe_taps(model, ["layer2.1.relu@in#-1"], torch.randn(1, 3, 64, 64))
    assert tap == Tap("layer2.1.relu@in#-1", 128, (8, 8), "map", "layer2.1.bn2", "ReLU", "norm", taps[2].depth)
    lines = table(taps).splitlines()
    assert (
        len(lines) == 6 and " ".join(lines[3].split()) == "layer2.1.relu@in#1 128 8x8 map layer2.1.bn2 ReLU norm 0.48"
    )
