"""Mixed images: mixup and CutMix, the same mixture for the student and its teachers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from classification.options.groups import Data

Mix = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def mixing(data: Data, num_classes: int) -> Mix | None:
    """Return what mixes a batch (B, 3, H, W) and its targets (B,) into (B, K) probabilities; None without options.

    Args:
        data: the options of --mixup and --cutmix.
        num_classes: K.


    With lambda drawn from Beta(alpha, alpha) for each batch, an image becomes lambda image + (1 - lambda) other
    (mixup), or has a rectangle of the part 1 - lambda of the other (CutMix); where both are asked for, a coin decides.

    Reference: Zhang et al., 2018, arXiv:1710.09412; Yun et al., 2019, arXiv:1905.04899.
    """
    if not (data.mixup or data.cutmix):
        return None
    from torchvision.transforms import v2  # a second, for those that mix

    kinds = [(v2.MixUp, data.mixup), (v2.CutMix, data.cutmix)]
    mixers = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    chosen = v2.RandomChoice(mixers)

    def mix(images: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        given = images.new_zeros(len(images), dtype=torch.int64) if target is None else target  # it insists on some
        mixed, soft = chosen(images, given)
        return mixed, None if target is None else soft

    return mix
