"""Resize and crop images of bytes as torchvision does, bit for bit, without importing it: that takes a second."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Fit(nn.Module):
    """Resize, then crop the square in the centre; an image of that size passes at once.

    Args:
        size: side of the square, in pixels.
        resize: of the short side before the crop, in pixels, at least `size`; `size` by default.
        interpolation: "nearest", "bilinear" or "bicubic".
        squash: resize both sides to `resize` instead, whatever the proportions.
    """

    def __init__(
        self, size: int, resize: int | None = None, interpolation: str = "bilinear", *, squash: bool = False
    ) -> None:
        super().__init__()
        self.size, self.resize = size, size if resize is None else resize
        self.interpolation, self.squash = interpolation, squash

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        if not self.squash:
            short = min(height, width)
            height, width = int(self.resize * height / short), int(self.resize * width / short)
        else:
            height = width = self.resize
        if image.shape[1:] != (height, width):
            image = resize(image, (height, width), self.interpolation)
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return image[:, top : top + self.size, left : left + self.size]


def resize(image: Tensor, size: tuple[int, int], interpolation: str = "bilinear") -> Tensor:
    """Resize an image (3, H, W) of bytes, without aliasing, in the layout (H, W, 3), which is the fastest."""
    batch = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)  # so that the result has that layout, too
    return F.interpolate(batch, size, mode=interpolation, antialias=interpolation != "nearest")[0]


def random_box(height: int, width: int) -> tuple[int, int, int, int]:
    """Draw a box of 8 % to 100 % of an image's area and proportions of 3:4 to 4:3, from torch's generator.

    Where ten draws do not fit into the image, the largest such box in its centre is taken. Draws and rounding are those
    of `torchvision.transforms.RandomResizedCrop`.

    Returns:
        Top, left, height and width, in pixels.
    """
    lowest, highest = torch.tensor((3 / 4, 4 / 3)).log().tolist()
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(0.08, 1.0).item()
        proportion = torch.empty(1).uniform_(lowest, highest).exp().item()
        box_width, box_height = round(math.sqrt(area * proportion)), round(math.sqrt(area / proportion))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(torch.randint(0, height - box_height + 1, (1,)))
            left = int(torch.randint(0, width - box_width + 1, (1,)))
            return top, left, box_height, box_width
    box_height, box_width = min(height, round(width / (3 / 4))), min(width, round(height * (4 / 3)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
