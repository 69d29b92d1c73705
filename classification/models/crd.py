"""The networks for 32 px that papers compare on CIFAR-100. They load the weight files that these papers share.

The files are {"model": tensors}, first used by contrastive representation distillation (RepDistiller; Tian et al.,
arXiv:1910.10699). If a network here or of torchvision is the same with other names, its tensors are renamed on loading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.shufflenetv2 import channel_shuffle

from classification.models import cifar, resnet, shufflenet

Renames = Sequence[tuple[str, str]]
Net = TypeVar("Net", bound=nn.Module)


def _rename_tensors(
    renames: Renames, mark: str, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any, **__: Any
) -> None:
    """Rename the tensors of a shared file in place; it is one if a tensor's name matches `mark`."""
    if not any(re.match(re.escape(prefix) + mark, name) for name in state):
        return
    for name in [name for name in state if name.startswith(prefix)]:
        new_name = name[len(prefix) :]
        for pattern, replacement in renames:
            new_name, count = re.subn(pattern, replacement, new_name, count=1)
            if count:
                break
        state[prefix + new_name] = state.pop(name)


def _accept_shared_names(network: Net, mark: str, renames: Renames) -> Net:
    """Make a network accept the names of a shared file too; of the renames, the first that matches is used."""
    network.register_load_state_dict_pre_hook(partial(_rename_tensors, renames, mark))  # type: ignore[no-untyped-call]
    return network


def _init_fan_out(network: nn.Module) -> None:
    """Initialise convolutions as the shared code does: Kaiming normal by fan-out, biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ConvResNet(nn.Module):
    """ResNet-6n+2 whose shortcuts are 1x1 convolutions where the width or the resolution changes.

    Args:
        depth: n, blocks in each of three stages.
        widths: channels of the stem and of the three stages.
        num_classes: K.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int = 100) -> None:
        super().__init__()
        num_in, *stages = widths
        self.conv1 = nn.Conv2d(3, num_in, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_in)
        self.relu = nn.ReLU(inplace=True)
        for number, num_out in enumerate(stages, start=1):
            stride = 1 if number == 1 else 2
            shortcut = None
            if stride > 1 or num_in != num_out:
                shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))
            blocks = [BasicBlock(num_in, num_out, stride, shortcut)]
            blocks += [BasicBlock(num_out, num_out) for _ in range(depth - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            num_in = num_out
        self.fc = nn.Linear(num_in, num_classes)
        _init_fan_out(self)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def conv_resnet(layers: int, num_classes: int = 100, *, wide: bool = False) -> ConvResNet:
    """Build a ResNet with `layers` = 6n + 2 layers and 16-16-32-64 channels, or if `wide` 32-64-128-256 (resnet8x4)."""
    return ConvResNet((layers - 2) // 6, (32, 64, 128, 256) if wide else (16, 16, 32, 64), num_classes)


def resnet50(num_classes: int = 100) -> ResNet:
    """Build a ResNet-50 of torchvision's blocks with a 3x3 stem that keeps the resolution."""
    network = ResNet(Bottleneck, [3, 4, 6, 3], num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()  # type: ignore[assignment]
    return _accept_shared_names(network, r"linear\.", [(r"^linear\.", "fc."), (r"\.shortcut\.", ".downsample.")])


def wide_resnet(depth: int, width: int, num_classes: int = 100) -> cifar.WideResNet:
    """Build a WRN-d-k; see `cifar.WideResNet`."""
    network = cifar.WideResNet(depth, width, num_classes)
    _init_fan_out(network)
    nn.init.zeros_(network.linear.bias)
    renames = [
        (r"^block(\d)\.layer\.(\d+)\.convShortcut\.", r"layer\1.\2.shortcut."),
        (r"^block(\d)\.layer\.", r"layer\1."),
        (r"^bn1\.", "bn."),
        (r"^fc\.", "linear."),
    ]
    return _accept_shared_names(network, r"block1\.layer\.", renames)


class VGG(nn.Module):
    """VGG with batch norms and one linear layer, without the pooling after the fourth block.

    Args:
        convolutions: in each of five blocks of 64, 128, 256, 512 and 512 channels.
        num_classes: K.
    """

    def __init__(self, convolutions: Sequence[int], num_classes: int = 100) -> None:
        super().__init__()
        num_in = 3
        for number, (num_out, num) in enumerate(zip((64, 128, 256, 512, 512), convolutions, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(num):
                layers += [nn.Conv2d(num_in, num_out, 3, padding=1), nn.BatchNorm2d(num_out), nn.ReLU(inplace=True)]
                num_in = num_out
            self.add_module(f"block{number}", nn.Sequential(*layers[:-1]))  # without the last ReLU, to tap before it
        self.classifier = nn.Linear(num_in, num_classes)
        _init_fan_out(self)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for number in range(5):
            x = F.relu(self.get_submodule(f"block{number}")(x))
            x = F.max_pool2d(x, 2) if number < 3 else x
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits


class ShuffleUnit(nn.Module):
    """A unit of ShuffleNet-V1: a depthwise convolution between grouped 1x1 ones; stride 2 appends the pooled input."""

    def __init__(self, num_in: int, num_out: int, stride: int, groups: int) -> None:
        super().__init__()
        middle = num_out // 4
        self.groups = 1 if num_in == 24 else groups  # the first unit's input is too narrow for groups
        self.conv1 = nn.Conv2d(num_in, middle, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, num_out, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(num_out)
        self.relu = nn.ReLU()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        joined = torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], dim=1) if self.stride == 2 else out + x
        activated: Tensor = self.relu(joined)
        return activated


class ShuffleNetV1(nn.Module):
    """ShuffleNet-V1 with 3 groups (Zhang et al., 2017, arXiv:1707.01083) with a 1x1 stem that keeps the resolution."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        num_in = 24
        for number, (num_out, units) in enumerate(((240, 4), (480, 8), (960, 4)), start=1):
            layers = [ShuffleUnit(num_in, num_out - num_in, 2, 3)]
            layers += [ShuffleUnit(num_out, num_out, 1, 3) for _ in range(units - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*layers))
            num_in = num_out
        self.linear = nn.Linear(num_in, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(images))))))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def shufflenet_v2(num_classes: int = 100) -> nn.Module:
    """Build a ShuffleNet-V2 x1.0 of the units of `shufflenet` with a 1x1 stem that keeps the resolution."""
    network: Any = shufflenet.shufflenet_v2(num_classes)
    network.conv1[0] = nn.Conv2d(3, 24, 1, bias=False)
    network.maxpool = nn.Identity()
    first = {"conv1": "branch1.0", "bn1": "branch1.1", "conv2": "branch1.2", "bn2": "branch1.3"}
    first |= {"conv3": "branch2.0", "bn3": "branch2.1", "conv4": "branch2.3", "bn4": "branch2.4"}
    first |= {"conv5": "branch2.5", "bn5": "branch2.6"}
    other = {"conv1": "branch2.0", "bn1": "branch2.1", "conv2": "branch2.3", "bn2": "branch2.4"}
    other |= {"conv3": "branch2.5", "bn3": "branch2.6"}
    renames = [
        (rf"^layer{n}\.{unit}\.{name}\.", rf"stage{n + 1}.{unit}.{new}." if unit == "0" else rf"stage{n + 1}.\1.{new}.")
        for n in (1, 2, 3)
        for unit, names in (("0", first), (r"([1-9]\d*)", other))
        for name, new in names.items()
    ]
    stem = [(r"^conv1\.", "conv1.0."), (r"^bn1\.", "conv1.1."), (r"^conv2\.", "conv5.0."), (r"^bn2\.", "conv5.1.")]
    named: nn.Module = _accept_shared_names(network, r"linear\.", [*renames, *stem, (r"^linear\.", "fc.")])
    return named


class Inverted(nn.Module):
    """An inverted residual: 1x1, depthwise 3x3, 1x1 without a ReLU. The first 1x1 is kept even if `expansion` is 1.

    Args:
        num_in: channels.
        num_out: channels.
        stride: of the depthwise convolution.
        expansion: factor from `num_in` to the channels in between.
    """

    def __init__(self, num_in: int, num_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = num_in * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(num_in, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, num_out, 1, bias=False),
            nn.BatchNorm2d(num_out),
        )
        self.adds = stride == 1 and num_in == num_out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.adds else out


class MobileNetV2(nn.Module):
    """MobileNet-V2 at half width (Sandler et al., 2018, arXiv:1801.04381) for 32 px: its stem has stride 2."""

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = _conv_bn_relu(3, 16, 3, 2)
        self.blocks = nn.ModuleList()
        num_in = 16
        # expansion, channels, blocks, stride
        for expansion, num_out, num, stride in (
            (1, 8, 1, 1),
            (6, 12, 2, 1),
            (6, 16, 3, 2),
            (6, 32, 4, 2),
            (6, 48, 3, 1),
            (6, 80, 3, 2),
            (6, 160, 1, 1),
        ):
            stage = [Inverted(num_in, num_out, stride, expansion)]
            stage += [Inverted(num_out, num_out, 1, expansion) for _ in range(num - 1)]
            self.blocks.append(nn.Sequential(*stage))
            num_in = num_out
        self.conv2 = _conv_bn_relu(num_in, 1280, 1, 1)
        last = nn.Linear(1280, num_classes)
        self.classifier = nn.Sequential(last)
        _init_fan_out(self)
        nn.init.normal_(last.weight, 0, 0.01)
        nn.init.zeros_(last.bias)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.conv1(images)
        for stage in self.blocks:
            x = stage(x)
        logits: Tensor = self.classifier(self.conv2(x).mean(dim=(2, 3)))
        return logits


def _conv_bn_relu(num_in: int, num_out: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(num_in, num_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(num_out), nn.ReLU(inplace=True))


PATHS: dict[type[nn.Module], Callable[[Any], list[str] | None]] = {
    ConvResNet: lambda model: resnet.last_blocks(*(len(getattr(model, f"layer{stage}")) for stage in (1, 2, 3))),
    ResNet: lambda model: resnet.last_blocks(3, 4, 6, 3),
    cifar.WideResNet: lambda model: cifar.taps("", model),
    VGG: lambda model: [f"block{number}" for number in (1, 2, 3, 4)],
    ShuffleNetV1: lambda model: [f"layer{n}.{last}.relu@in" for n, last in ((1, 3), (2, 7), (3, 3))],
    MobileNetV2: lambda model: [f"blocks.{number}" for number in (1, 2, 4, 6)],
}


def taps(arch: str, model: nn.Module | None) -> list[str] | None:
    """Return the paths of the taps, deepest last: the shared code's features before the ReLU."""
    if model is None:
        return None
    return PATHS.get(type(model), lambda _: shufflenet.taps(arch, model))(model)
