"""MobileNet-V1; MobileNet-V2 with the strides of the published matching experiments, and for 32 px."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from classification.models.published import from_torchvision

if TYPE_CHECKING:
    from torchvision.models.mobilenetv2 import MobileNetV2

# Output channels and stride of the 13 depthwise separable blocks (Howard et al., 2017, arXiv:1704.04861, table 1).
_BLOCKS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


def _conv_bn_relu(num_in: int, num_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(num_in, num_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(num_out), nn.ReLU(inplace=True)]


class MobileNetV1(nn.Module):
    """MobileNet-V1 at width 1: a stem and 13 depthwise separable blocks, named as in the published checkpoints."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        blocks = [nn.Sequential(*_conv_bn_relu(3, 32, 3, stride=2))]
        num_in = 32
        for num_out, stride in _BLOCKS:
            depthwise = _conv_bn_relu(num_in, num_in, 3, stride, groups=num_in)
            blocks.append(nn.Sequential(*depthwise, *_conv_bn_relu(num_in, num_out, 1)))
            num_in = num_out
        self.model = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(num_in, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pool(self.model(images)).flatten(1))
        return logits


def mobilenet_v2_mgd(num_classes: int = 1000) -> MobileNetV2:
    """Build MobileNet-V2 with its third stride of 2 at the 96-channel stage, not at the 64-channel one as usual."""
    from torchvision.models.mobilenetv2 import MobileNetV2  # slow to import

    setting = [
        # expansion, channels, blocks, stride
        [1, 16, 1, 1],
        [6, 24, 2, 2],
        [6, 32, 3, 2],
        [6, 64, 4, 1],
        [6, 96, 3, 2],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    return MobileNetV2(num_classes=num_classes, inverted_residual_setting=setting)


def cifar_mobilenet_v2(num_classes: int = 10) -> MobileNetV2:
    """Build a MobileNet-V2 for 32 px: three resolutions, with 16, 32 and 64 hidden channels in their last blocks."""
    from torchvision.models.mobilenetv2 import MobileNetV2  # slow to import

    setting = [[1, 8, 1, 1], [2, 8, 2, 1], [2, 16, 2, 2], [2, 32, 3, 2]]
    network = MobileNetV2(num_classes=num_classes, inverted_residual_setting=setting, dropout=0.0)
    stem: Any = network.features[0]
    stem[0].stride = (1, 1)
    return network


def mobilenet_v2(**options: Any) -> nn.Module:
    """Build torchvision's MobileNet-V2."""
    return from_torchvision("mobilenet_v2", **options)


PATHS = {
    "mobilenet_v1": [f"model.{block}.5@in" for block in (3, 5, 11, 13)],
    "mobilenet_v2": [f"features.{block}.conv.1.2@in" for block in (6, 13, 17)],
    "mobilenet_v2_mgd": [f"features.{block}.conv.1.2@in" for block in (7, 11, 17)],
    "cifar_mobilenet_v2": [f"features.{block}.conv.1.2@in" for block in (3, 5, 8)],
}


def taps(arch: str, model: nn.Module | None) -> list[str]:
    """Return the paths of the taps, deepest last."""
    return PATHS[arch]
