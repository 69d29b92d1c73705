"""Networks for 32 px: ResNet-6n+2 with option A shortcuts, and wide ResNets."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from classification.models.resnet import last_blocks


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an option A shortcut: subsampled, missing channels zero, half on each side."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride
        self.missing = num_out - num_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.missing:  # `pad` copies the map, even by zero channels
            front = self.missing // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, front, self.missing - front))
        activated: Tensor = self.relu(out + x)
        return activated


class CifarResNet(nn.Module):
    """ResNet for 32 px (He et al., 2016, arXiv:1512.03385, section 4.2): a 3x3 stem and three stages of `depth` blocks.

    Args:
        depth: blocks in a stage; the network counts 6 * depth + 2 layers.
        widths: channels of the stem and of the three stages.
        num_classes: K.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int = 10) -> None:
        super().__init__()
        stem, *stages = widths
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        num_in = stem
        for number, num_out in enumerate(stages, start=1):
            blocks = [BasicBlock(num_in, num_out, 1 if number == 1 else 2)]
            blocks += [BasicBlock(num_out, num_out, 1) for _ in range(depth - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            num_in = num_out
        self.linear = nn.Linear(num_in, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


class PreActBlock(nn.Module):
    """BN-ReLU-convolution twice; where the width changes, the shortcut is a 1x1 convolution of the activated input."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(num_in)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.shortcut = None if num_in == num_out else nn.Conv2d(num_in, num_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        out: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """WRN-d-k for 32 px (Zagoruyko, Komodakis, 2016, arXiv:1605.07146).

    Args:
        depth: d = 6 * blocks in a stage + 4.
        width: k; the stages have 16k, 32k and 64k channels.
        num_classes: K.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, depth: int, width: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        num_in = 16
        for number, base in enumerate((16, 32, 64), start=1):
            blocks = []
            for block in range((depth - 4) // 6):
                stride = 2 if number > 1 and block == 0 else 1
                blocks.append(PreActBlock(num_in, base * width, stride))
                num_in = base * width
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(num_in)
        self.relu = nn.ReLU(inplace=True)
        self.linear = nn.Linear(num_in, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        logits: Tensor = self.linear(self.relu(self.bn(x)).mean(dim=(2, 3)))
        return logits


def cifar_resnet(
    layers: int, factor: float = 1.0, num_classes: int = 10, widths: tuple[int, ...] | None = None
) -> CifarResNet:
    """Build a ResNet with `layers` = 6n + 2 layers; its `widths` are by default 16, 32 and 64 times `factor`."""
    one, two, three = widths or (round(width * factor) for width in (16, 32, 64))
    if not 8 <= layers <= 2000 or layers % 6 != 2 or not 1 <= min(one, two, three) <= max(one, two, three) <= 4096:
        raise ValueError(
            f"a CIFAR ResNet has 6n + 2 layers (20, 56 ...), 2000 at most, and at least one channel, at most 4096; got "
            f"{layers}, {one}-{two}-{three}"
        )
    if not one <= two <= three:
        raise ValueError(f"option A shortcuts cannot narrow: the widths {one}-{two}-{three} must not fall")
    return CifarResNet((layers - 2) // 6, (one, one, two, three), num_classes)


def taps(arch: str, model: nn.Module | None) -> list[str] | None:
    """Return the paths of the taps, deepest last."""
    if isinstance(model, WideResNet):
        return ["layer2.0.relu1@in", "layer3.0.relu1@in", "relu@in"]
    if not isinstance(model, CifarResNet):
        return None
    return last_blocks(*(len(getattr(model, f"layer{stage}")) for stage in (1, 2, 3)))
