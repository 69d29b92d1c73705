"""Resize the position embeddings of networks that accept only one image size."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import nn


def fit_size(model: nn.Module, size: int) -> bool:
    """Make a network accept square images of this size, if it accepts only another size.

    timm's transformers and a function of torchvision (for its ViT) resample the position embeddings. A network that
    runs at this size already, or has no such embeddings, is not changed.

    Args:
        model: with its weights loaded. It is in eval mode afterwards if it has position embeddings.
        size: side of the images, in pixels.

    Returns:
        Whether the network was changed.
    """
    network: Any = model
    of_timm = callable(getattr(model, "set_input_size", None))
    of_torchvision = hasattr(getattr(model, "encoder", None), "pos_embedding") and hasattr(model, "image_size")
    if not (of_timm or of_torchvision) or _runs(model, size):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about timm's use of interpolation
            if of_timm:
                network.set_input_size(img_size=(size, size))
            else:
                _resample(network, size)
    except (RuntimeError, ValueError, AssertionError):  # an impossible size: the caller runs the network and says why
        return False
    return True


@torch.no_grad()
def _runs(model: nn.Module, size: int) -> bool:
    try:
        model.eval()(torch.zeros(1, 3, size, size))
    except Exception:  # a network may raise anything at another size
        return False
    return True


def _resample(model: Any, size: int) -> None:
    from torchvision.models.vision_transformer import interpolate_embeddings  # slow to import

    name = "encoder.pos_embedding"
    embedding = OrderedDict({name: model.get_parameter(name).detach()})
    state = interpolate_embeddings(size, model.patch_size, embedding)
    model.encoder.pos_embedding = nn.Parameter(state[name])
    model.image_size, model.seq_length = size, state[name].shape[1]
