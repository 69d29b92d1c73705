"""What happens to the pixels of an image before a network sees them, on bytes, and to those of a batch."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Transform = Callable[[Tensor], Tensor]


def train_transform(args: Namespace) -> Transform:
    """Random resized crop, or with --train-crop pad a shift by an eighth of the side; mirror. Of (3, H, W) bytes."""
    size = args.img_size
    crop = [_Fit(size), _PadCrop(size)] if args.train_crop == "pad" else [_RandomResized(size)]
    return v2.Compose([*crop, _Mirror()] if args.hflip else crop)


def eval_transform(args: Namespace) -> Transform:
    """Resize to img-size * 256/224 and crop the centre; with --train-crop pad, resize to img-size alone."""
    size = args.img_size
    crop = [_Fit(size)] if args.train_crop == "pad" else [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    return v2.Compose(crop)


class _Fit(v2.Compose):
    """Resize and crop the centre; an image that fits passes at once."""

    def __init__(self, size: int) -> None:
        super().__init__([v2.Resize(size), v2.CenterCrop(size)])
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        return image if image.shape[1:] == (self.size, self.size) else super().forward(image)


class _PadCrop(torch.nn.Module):
    """Shift by up to an eighth of the side, black around; torchvision's own takes ten times as long on small images."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.pad = size, size // 8

    def forward(self, image: Tensor) -> Tensor:
        top, left = torch.randint(2 * self.pad + 1, (2,)).tolist()
        wide = F.pad(image, [self.pad] * 4)
        return wide[:, top : top + self.size, left : left + self.size]


class _RandomResized(v2.RandomResizedCrop):
    """The crop of torchvision, kept in the layout of the bytes, in which resizing is fastest."""

    def __init__(self, size: int) -> None:
        super().__init__(size, antialias=True)

    def forward(self, image: Tensor) -> Tensor:
        place = self.make_params([image])
        top, left, height, width = (place[name] for name in ("top", "left", "height", "width"))
        part = image[None, :, top : top + height, left : left + width]
        part = part.contiguous(memory_format=torch.channels_last)
        return F.interpolate(part, self.size, mode="bilinear", antialias=True)[0]


class _Mirror(torch.nn.Module):
    """The mirror of torchvision, with its draws, in the layout of the bytes: in a quarter of the time."""

    def forward(self, image: Tensor) -> Tensor:
        return image if torch.rand(1) >= 0.5 else image.permute(1, 2, 0).flip(1).permute(2, 0, 1)


def normalise(images: Tensor) -> Tensor:
    """Turn bytes (B, H, W, 3) into what networks see: (B, 3, H, W) float32, channels last in memory.

    x = (bytes / 255 - MEAN) / STD
    """
    # Whole rows at once: a broadcast over the last three values is slow on a processor.
    mean, std = (255 * torch.tensor(values, device=images.device).repeat(images.shape[2]) for values in (MEAN, STD))
    return images.flatten(2).float().sub_(mean).div_(std).unflatten(2, (-1, 3)).permute(0, 3, 1, 2)
