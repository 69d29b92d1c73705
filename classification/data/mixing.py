"""Mixup and CutMix: mix the images of a batch, the same way for the student and its teachers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from classification.options.groups import Data

Mix = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def make_mixer(data: Data, num_classes: int) -> Mix | None:
    """Return a function that mixes images (B, 3, H, W) and targets (B,) into images and (B, K) probabilities.

    For each batch, lambda is drawn from Beta(alpha, alpha). Mixup makes lambda image + (1 - lambda) other. CutMix
    replaces a rectangle, the part 1 - lambda of the area, by that of the other image. With both options, one of the two
    is drawn for each batch.

    Args:
        data: the options --mixup and --cutmix.
        num_classes: K.

    Returns:
        The function, or None without these options.

    Reference: Zhang et al., 2018, arXiv:1710.09412; Yun et al., 2019, arXiv:1905.04899.
    """
    if not (data.mixup or data.cutmix):
        return None
    from torchvision.transforms import v2  # takes a second, so only if needed

    kinds = [(v2.MixUp, data.mixup), (v2.CutMix, data.cutmix)]
    mixers = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    mixer = v2.RandomChoice(mixers)

    def mix(images: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        labels = images.new_zeros(len(images), dtype=torch.int64) if target is None else target  # v2 needs labels
        mixed, probabilities = mixer(images, labels)
        return mixed, None if target is None else probabilities

    return mix
