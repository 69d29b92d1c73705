"""Run a network without changing its state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Put a network in eval mode, and restore the mode of every module afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore random number generators and buffers afterwards, which some networks use in eval mode, too."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = {value.device.index or 0 for value in model.parameters() if value.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in kept and kept[name].shape == buffer.shape and not torch.equal(kept[name], buffer):
                    buffer.copy_(kept[name])
