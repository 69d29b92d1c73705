"""ShuffleNet-V2 whose units leave out their last ReLU, which the next unit applies, so that it can be tapped before.

ReLU is idempotent and commutes with channel shuffle and concatenation. So this network computes the same as
torchvision's, and its tensors have the same names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import ShuffleNetV2
from torchvision.models.shufflenetv2 import InvertedResidual, channel_shuffle


class _Unit(InvertedResidual):
    """A unit that takes and returns maps before the ReLU."""

    def __init__(self, inp: int, oup: int, stride: int) -> None:
        super().__init__(inp, oup, stride)
        self.branch2[-1] = nn.Identity()
        if stride > 1:
            self.branch1[-1] = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.relu(x)
            first, second = self.branch1(x), self.branch2(x)
        else:
            first, second = x.chunk(2, dim=1)
            second = self.branch2(F.relu(second))
        shuffled: Tensor = channel_shuffle(torch.cat((first, second), dim=1), 2)
        return shuffled


def shufflenet_v2(num_classes: int = 1000) -> ShuffleNetV2:
    """Build ShuffleNet-V2 x1.0 (Ma et al., 2018, arXiv:1807.11164) with maps before the ReLU between its units."""
    model = ShuffleNetV2([4, 8, 4], [24, 116, 232, 464, 1024], num_classes, inverted_residual=_Unit)
    model.stage4.add_module("relu", nn.ReLU())
    return model


def taps(arch: str, model: nn.Module | None) -> list[str]:
    """Return the paths of the taps, deepest last."""
    return ["stage2", "stage3", "stage4.3"]
