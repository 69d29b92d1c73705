"""PP-LCNet at the width of the published mutual-learning experiments, made of timm's parts."""

from __future__ import annotations

from timm.models.mobilenetv3 import MobileNetV3, _gen_lcnet
from torch import nn


def pplcnet_x2_5(num_classes: int = 1000) -> MobileNetV3:
    """Build PP-LCNet at 2.5 times its base widths (Cui et al., 2021, arXiv:2109.15099), with the published dropout 0.2.

    Unlike in the published network, timm's last 1x1 convolution has a bias (1,280 values).
    """
    # timm needs the name of a known variant; only the preprocessing defaults of "lcnet_150" are used.
    return _gen_lcnet("lcnet_150", 2.5, num_classes=num_classes, drop_rate=0.2)


def taps(arch: str, model: nn.Module | None) -> list[str]:
    """Return the paths of the taps, deepest last."""
    return [f"blocks.{end}.bn2.act@in" for end in ("1.1", "2.1", "4.3", "5.1")]
