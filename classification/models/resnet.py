"""The ResNets of torchvision; each stage is tapped at the sum before its last ReLU."""

from __future__ import annotations

from typing import Any

from torch import nn

from classification.models.published import from_torchvision


def resnet(layers: int, **options: Any) -> nn.Module:
    """Build a ResNet with this number of layers (He et al., 2015, arXiv:1512.03385)."""
    return from_torchvision(f"resnet{layers}", **options)


BLOCKS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


def taps(arch: str, model: nn.Module | None) -> list[str]:
    """Return the paths of the taps, deepest last."""
    return last_blocks(*BLOCKS[arch])


def last_blocks(*blocks: int) -> list[str]:
    """Return the tap at the sum before the last ReLU of each stage, for these numbers of blocks per stage."""
    return [f"layer{stage}.{number - 1}.relu@in#-1" for stage, number in enumerate(blocks, start=1)]
