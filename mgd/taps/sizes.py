"""Images to run a network on: given ones, or random ones of a given size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mgd.taps.kept import evaluated

Size = Tensor | int | tuple[int, int]  # (B, C, H, W), or height and width, one number for a square


def two_images(model: nn.Module, images_or_size: Size) -> Tensor:
    """Return two images: with one, shapes would not show which dimension is the batch.

    Random images are on the network's device, and have 3 channels, or as many as its first convolution takes if it does
    not run on 3.

    Raises:
        ValueError: the argument is neither images nor a size.
    """
    if isinstance(images_or_size, Tensor):
        if images_or_size.ndim != 4 or not len(images_or_size):
            raise ValueError(
                f"expected images (B, 3, H, W), or height and width; got the shape {tuple(images_or_size.shape)}"
            )
        return torch.cat([images_or_size[:2], images_or_size[:1].flip(3)])[:2]
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    random = torch.randn(2, 3, *height_and_width(images_or_size), generator=torch.Generator().manual_seed(0))
    if first != 3 and not _runs(model, random.to(parameter)):
        random = random.mean(1, keepdim=True).repeat(1, first, 1, 1)
    return random.to(parameter.device, parameter.dtype)


def height_and_width(images_or_size: Size) -> tuple[int, int]:
    """Return height and width of images.

    Raises:
        ValueError: the argument is neither images nor a size.
    """
    try:
        sides = images_or_size.shape[2:] if isinstance(images_or_size, Tensor) else images_or_size
        height, width = (side.__index__() for side in (sides if isinstance(sides, tuple | list) else (sides, sides)))
        if min(height, width) > 0:
            return height, width
    except (AttributeError, TypeError, ValueError):  # not two whole numbers
        pass
    raise ValueError(f"expected images (B, 3, H, W), or height and width as 224 or (192, 256); got {images_or_size!r}")


@torch.no_grad()
def _runs(model: nn.Module, images: Tensor) -> bool:
    with evaluated(model):
        try:
            model(images)
        except Exception:  # a network may raise anything
            return False
    return True
