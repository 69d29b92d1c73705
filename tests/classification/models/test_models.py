from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from classification.errors import UserError
from classification.models import NETWORKS, build, default_taps
from mgd import Taps, dry_forward, norms_before

LARGE = ("resnet101", "resnet152", "cifar_resnet110", "wrn_40_1", "wrn_40_2", "cifar_resnet56")
SMALL = [n for n in NETWORKS if n not in LARGE and not n.startswith("crd_")]  # those of crd: test_crd.py


def warmed(model: nn.Module) -> nn.Module:
    """Give the norms statistics and weights that are not 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.5, generator=generator)
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def taps_of(arch: str, model: nn.Module) -> list[str]:
    found = default_taps(arch, model)
    assert found is not None
    return found


def tapped(arch: str, size: int) -> tuple[Taps, torch.Tensor]:
    torch.manual_seed(0)
    model = warmed(build(arch, 5))
    return Taps(model, taps_of(arch, model)), torch.randn(2, 3, size, size)


def check(taps: Taps, images: torch.Tensor, expected: list[torch.Tensor]) -> None:
    for _ in range(2):
        features = dry_forward(taps, images).features
        assert len(features) == len(expected)
        for got, want in zip(features, expected, strict=True):
            assert (want < 0).any(), "a map before the ReLU has negative values"
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mobilenet_v1_by_hand() -> None:
    taps, images = tapped("mobilenet_v1", 64)
    net: Any = taps.model
    x, maps = images, []
    for number, block in enumerate(net.model):
        for conv, bn in zip(block[::3], block[1::3], strict=True):
            before = bn(F.conv2d(x, conv.weight, None, conv.stride, conv.padding, 1, conv.groups))
            x = torch.relu(before)
        if number in (3, 5, 11, 13):
            maps.append(before)
    assert [m.shape[1] for m in maps] == [128, 256, 512, 1024]
    assert [m.shape[2] for m in maps] == [16, 8, 4, 2]
    check(taps, images, maps)
    torch.testing.assert_close(taps(images).logits, net.fc(x.mean((2, 3))))


@torch.no_grad()
@pytest.mark.parametrize(
    ("arch", "blocks", "channels"),
    [("mobilenet_v2", (6, 13, 17), [192, 576, 960]), ("mobilenet_v2_mgd", (7, 11, 17), [192, 384, 960])],
)
def test_mobilenet_v2_by_hand(arch: str, blocks: tuple[int, ...], channels: list[int]) -> None:
    taps, images = tapped(arch, 64)
    net: Any = taps.model
    x, maps = images, []
    for number, layer in enumerate(net.features):
        if number in blocks:
            (pw_conv, pw_bn, _), (dw_conv, dw_bn, _) = layer.conv[0], layer.conv[1]
            maps.append(dw_bn(dw_conv(pw_bn(pw_conv(x)).clamp(0, 6))))
        x = layer(x)
    assert [m.shape[1] for m in maps] == channels
    assert [m.shape[2] for m in maps] == [8, 4, 2]  # the resolutions of a ResNet's last three stages
    check(taps, images, maps)


@torch.no_grad()
@pytest.mark.parametrize(("arch", "norm"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_resnet_by_hand(arch: str, norm: str) -> None:
    taps, images = tapped(arch, 64)
    net: Any = taps.model
    x, maps = net.maxpool(torch.relu(net.bn1(net.conv1(images)))), []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in stage:
            y = torch.relu(block.bn1(block.conv1(x)))
            y = block.bn2(block.conv2(y))
            if norm == "bn3":
                y = block.bn3(block.conv3(torch.relu(y)))
            before = y + (x if block.downsample is None else block.downsample(x))
            x = torch.relu(before)
        maps.append(before)
    check(taps, images, maps)
    norms = norms_before(taps, images)
    assert norms == [getattr(stage[-1], norm) for stage in (net.layer1, net.layer2, net.layer3, net.layer4)]


@torch.no_grad()
def test_shufflenet_v2_computes_what_torchvision_computes_from_the_same_weights() -> None:
    theirs: Any = warmed(torchvision.models.shufflenet_v2_x1_0(num_classes=5))
    ours = build("shufflenet_v2", 5).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images))
    taps = Taps(ours, taps_of("shufflenet_v2", ours))
    maps = dry_forward(taps, images).features
    x = theirs.maxpool(theirs.conv1(images))
    for stage, before in zip((theirs.stage2, theirs.stage3, theirs.stage4), maps, strict=True):
        x = stage(x)
        assert (before < 0).any()
        torch.testing.assert_close(torch.relu(before), x)
    assert [m.shape[1] for m in maps] == [116, 232, 464]
    assert norms_before(taps, images) == [None, None, None]  # the norms cover half of the channels


@torch.no_grad()
@pytest.mark.parametrize("arch", ["cifar_resnet20", "cifar_resnet8x4", "cifar_resnet20_w0.625"])
def test_cifar_resnet_by_hand(arch: str) -> None:
    taps, images = tapped(arch, 32)
    net: Any = taps.model
    x, maps = torch.relu(net.bn1(net.conv1(images))), []
    for stage in (net.layer1, net.layer2, net.layer3):
        for block in stage:
            y = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
            if x.shape != y.shape:
                stride, missing = x.shape[2] // y.shape[2], y.shape[1] - x.shape[1]
                padded = torch.zeros_like(y)
                padded[:, missing // 2 : missing // 2 + x.shape[1]] = x[:, :, ::stride, ::stride]
                x = padded
            before = y + x
            x = torch.relu(before)
        maps.append(before)
    check(taps, images, maps)
    assert norms_before(taps, images) == [stage[-1].bn2 for stage in (net.layer1, net.layer2, net.layer3)]
    torch.testing.assert_close(taps(images).logits, net.linear(x.mean((2, 3))))


@torch.no_grad()
def test_wide_resnet_by_hand() -> None:
    taps, images = tapped("wrn_16_2", 32)
    net: Any = taps.model
    x, maps = net.conv1(images), []
    for number, stage in enumerate((net.layer1, net.layer2, net.layer3)):
        for block in stage:
            normalised = block.bn1(x)
            if number and block is stage[0]:
                maps.append(normalised)
            active = torch.relu(normalised)
            y = block.conv2(torch.relu(block.bn2(block.conv1(active))))
            x = y + (x if block.shortcut is None else block.shortcut(active))
    maps.append(net.bn(x))
    check(taps, images, maps)
    assert norms_before(taps, images) == [net.layer2[0].bn1, net.layer3[0].bn1, net.bn]


def test_mobilenet_for_32_px_is_tapped_at_three_resolutions() -> None:
    net = build("cifar_mobilenet_v2", 10)
    maps = dry_forward(Taps(net, taps_of("cifar_mobilenet_v2", net)), torch.zeros(1, 3, 32, 32)).features
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


@torch.no_grad()
def test_pplcnet_has_the_published_size_and_is_tapped_before_the_activations() -> None:
    net = build("pplcnet_x2_5", 1000).eval()
    numbers = {name: p.numel() for name, p in net.named_parameters()}
    assert numbers.pop("conv_head.bias") == 1280  # the published network has none
    running = sum(b.numel() for name, b in net.named_buffers() if "running" in name)
    assert sum(numbers.values()) == 9_017_560
    assert sum(numbers.values()) + running == 9_044_920  # published: 9.04 million
    images = torch.randn(1, 3, 64, 64)
    taps = Taps(net, [*taps_of("pplcnet_x2_5", net), "blocks.1", "blocks.2", "blocks.4", "blocks.5"])
    outputs = dry_forward(taps, images)
    assert outputs.logits.shape == (1, 1000)
    before, after = outputs.features[:4], outputs.features[4:]
    assert [tuple(x.shape[1:]) for x in before] == [(160, 16, 16), (320, 8, 8), (640, 4, 4), (1280, 2, 2)]
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(F.hardswish(x), y)


def test_names_of_a_cifar_resnet() -> None:
    state = build("cifar_resnet56", 10).state_dict()
    assert {"conv1.weight", "bn1.running_var", "layer3.8.conv2.weight", "linear.bias"} <= set(state)
    assert sum(v.numel() for n, v in state.items() if n.split(".")[-1] in ("weight", "bias")) == 853_018


@pytest.mark.parametrize(
    "arch", [*SMALL, "cifar_resnet14_w0.5", "cifar_resnet8_6-8-12", "torchvision:regnet_y_400mf", "timm:lcnet_050"]
)
def test_every_name_builds_runs_and_takes_classes(arch: str) -> None:
    size = 32 if arch.startswith(("cifar", "wrn")) else 64
    model = build(arch, 7)
    assert model.eval()(torch.randn(1, 3, size, size)).shape == (1, 7)
    paths = default_taps(arch, model)
    assert (paths is None) == (":" in arch)
    if paths:
        assert len(dry_forward(Taps(model, paths), torch.zeros(1, 3, size, size)).features) == len(paths)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("mobilnet_v1", "mobilenet_v1"),
        ("torchvision:resnet51", "torchvision:resnet50"),
        ("timm:resnet51", "timm:resnet50"),
        ("cifar_resnet21", "6n"),
        ("cifar_resnet20_w0", "at least one channel"),
        ("timm:resnet18.nope", "cannot build"),
    ],
)
def test_unknown_names_are_refused_with_close_ones(arch: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(arch, 5)
