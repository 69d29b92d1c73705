"""The images that a network is looked at with: those that are given, or made ones of a size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mgd.taps.kept import evaluated

Size = Tensor | int | tuple[int, int]  # (B, C, H, W), or height and width, one number for a square


def two_images(model: nn.Module, given: Size) -> Tensor:
    """Return two images on the network's device: of a batch of one, no shape would tell the batch.

    Made images have 3 channels, or as many as the network's first convolution reads where it does not run on 3.

    Raises:
        ValueError: neither images nor a size.
    """
    if isinstance(given, Tensor):
        if given.ndim != 4 or not len(given):
            raise ValueError(f"expected images (B, 3, H, W), or height and width; got the shape {tuple(given.shape)}")
        return torch.cat([given[:2], given[:1].flip(3)])[:2]
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    made = torch.randn(2, 3, *height_and_width(given), generator=torch.Generator().manual_seed(0))
    if first != 3 and not _runs(model, made.to(parameter)):
        made = made.mean(1, keepdim=True).repeat(1, first, 1, 1)
    return made.to(parameter.device, parameter.dtype)


def height_and_width(given: Size) -> tuple[int, int]:
    """Return height and width of images.

    Raises:
        ValueError: neither images nor a size.
    """
    try:
        sides = given.shape[2:] if isinstance(given, Tensor) else given
        height, width = (side.__index__() for side in (sides if isinstance(sides, tuple | list) else (sides, sides)))
        if min(height, width) > 0:
            return height, width
    except (AttributeError, TypeError, ValueError):  # no whole numbers, or not two
        pass
    raise ValueError(f"expected images (B, 3, H, W), or height and width as 224 or (192, 256); got {given!r}")


@torch.no_grad()
def _runs(model: nn.Module, images: Tensor) -> bool:
    with evaluated(model):
        try:
            model(images)
        except Exception:  # a network may raise anything
            return False
    return True
