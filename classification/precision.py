"""Numbers of 16 bits: autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class MixedPrecision(nn.Module):
    """Autocast inside the module that is wrapped: the threads of DataParallel do not inherit its type.

    Args:
        module: what to run.
        device: whose autocast.
        kind: "off", "bf16" or "fp16".
    """

    def __init__(self, module: nn.Module, device: torch.device, kind: str) -> None:
        super().__init__()
        self.module, self.device_type, self.kind = module, device.type, kind

    def forward(self, *inputs: Any) -> Any:
        with autocast(self.device_type, self.kind):
            return self.module(*inputs)


def autocast(device_type: str, kind: str) -> torch.autocast:
    """Return the context of "bf16" or "fp16", or one that does nothing for "off"."""
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    return torch.autocast(device_type, dtype, enabled=kind != "off")
