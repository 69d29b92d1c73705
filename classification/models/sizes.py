"""Networks that are built for one size of images: their position embeddings are resampled for another."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import nn


def fit_size(model: nn.Module, size: int) -> bool:
    """Make a network take square images of a size, where it takes those of another size alone.

    timm's transformers resample their position embeddings and tables themselves; of torchvision's ViT its own function
    does it. A network that runs at this size, or that has no such embeddings, is left as it is.

    Args:
        model: with its weights loaded; it is left in eval mode where it was tried.
        size: side of the images, in pixels.

    Returns:
        Whether it was changed.
    """
    network: Any = model
    of_timm = callable(getattr(model, "set_input_size", None))
    of_torchvision = hasattr(getattr(model, "encoder", None), "pos_embedding") and hasattr(model, "image_size")
    if not (of_timm or of_torchvision) or _runs(model, size):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on how timm interpolates
            if of_timm:
                network.set_input_size(img_size=(size, size))
            else:
                _resample(network, size)
    except (RuntimeError, ValueError, AssertionError):  # a size that it cannot take: trying it says why
        return False
    return True


@torch.no_grad()
def _runs(model: nn.Module, size: int) -> bool:
    try:
        model.eval()(torch.zeros(1, 3, size, size))
    except Exception:  # whatever a network raises at a size that is not its own
        return False
    return True


def _resample(model: Any, size: int) -> None:
    from torchvision.models.vision_transformer import interpolate_embeddings  # slow to import

    name = "encoder.pos_embedding"
    own = OrderedDict({name: model.get_parameter(name).detach()})
    state = interpolate_embeddings(size, model.patch_size, own)
    model.encoder.pos_embedding = nn.Parameter(state[name])
    model.image_size, model.seq_length = size, state[name].shape[1]
