"""Numbers of 16 bits: autocast, and where a processor is better off without."""

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


class WideConv2d(nn.Conv2d):
    """A convolution in float32 inside autocast, its output as its input's type."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return super().forward(images.float()).to(images.dtype)


def widen_strided_depthwise(network: nn.Module) -> int:
    """Turn every depthwise convolution of a stride above 1 into a `WideConv2d`, in place.

    On processors, the library behind torch has no fast gradient in bfloat16 for them, and takes ten to a hundred times
    as long as in float32: a third of a step of a MobileNet.

    Returns:
        How many were turned.
    """
    strided = [m for m in network.modules() if type(m) is nn.Conv2d and m.groups == m.in_channels > 1 < max(m.stride)]
    for conv in strided:
        conv.__class__ = WideConv2d
    return len(strided)
