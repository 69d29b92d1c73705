"""Resize and crop images of bytes, bit for bit as torchvision does, which takes a second to import."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Fit(nn.Module):
    """Resize an image, if it has another size, and crop the square in the centre.

    Args:
        size: side of the square, in pixels.
        resize: length of the short side before the crop, in pixels, at least `size`; by default `size`.
        interpolation: "nearest", "bilinear" or "bicubic".
        squash: resize both sides to `resize`, so that the proportions change.
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
    """Resize an image (3, H, W) of bytes with antialiasing; the memory layout of the result is (H, W, 3)."""
    batch = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)  # channels last is the fastest layout
    return F.interpolate(batch, size, mode=interpolation, antialias=interpolation != "nearest")[0]


def random_box(height: int, width: int) -> tuple[int, int, int, int]:
    """Draw a box with 8 % to 100 % of an image's area and proportions from 3:4 to 4:3, using torch's generator.

    If ten boxes do not fit into the image, the largest allowed box in the centre is returned. Draws and rounding are
    those of `torchvision.transforms.RandomResizedCrop`.

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
