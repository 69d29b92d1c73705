"""Linear probing: train only the last layer of a classifier."""

from __future__ import annotations

import torch
from torch import nn

from classification.errors import UserError
from mgd import probe


def freeze_body(model: nn.Module, size: int) -> list[nn.Module]:
    """Freeze all parameters except those of the linear layer that returns the logits.

    Args:
        model: a classifier.
        size: side of its images, in pixels.

    Returns:
        All other modules. They must stay in eval mode, so that dropout and batch statistics do not change either.

    Raises:
        UserError: the logits are not the output of one linear layer.
    """
    weight = probe(model, torch.zeros(1, 3, size, size)).classifier
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    heads = [layer for layer in layers if weight is not None and layer.weight.data_ptr() == weight.data_ptr()]
    if not heads:
        raise UserError(
            "--linear-probe 1 trains the linear layer that returns the logits, but this network has none: leave out "
            "--linear-probe to train the whole network"
        )
    head = heads[0]
    model.requires_grad_(False)
    head.requires_grad_(True)
    return [module for module in model.modules() if module is not head]
