"""The last layer of a classifier: training it alone, on a network that stays as it is."""

from __future__ import annotations

import torch
from torch import nn

from classification.errors import UserError
from mgd import probe


def freeze_body(model: nn.Module, size: int) -> list[nn.Module]:
    """Let only the layer train whose output the logits are.

    Args:
        model: a classifier.
        size: side of its images, in pixels.

    Returns:
        All other modules, whose `training` has to stay off: dropout and batch statistics belong to the body.

    Raises:
        UserError: the logits are not the output of one linear layer.
    """
    weight = probe(model, torch.zeros(1, 3, size, size)).classifier
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    found = [layer for layer in layers if weight is not None and layer.weight.data_ptr() == weight.data_ptr()]
    if not found:
        raise UserError(
            "--linear-probe 1 trains the linear layer that returns the logits, but this network has none: leave out "
            "--linear-probe to train the whole network"
        )
    head = found[0]
    model.requires_grad_(False)
    head.requires_grad_(True)
    return [module for module in model.modules() if module is not head]
