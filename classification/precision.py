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


class WideLinear(nn.Linear):
    """A linear layer in float32 inside autocast, its output as its input's type."""

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            return super().forward(inputs.float()).to(inputs.dtype)


def widen(module: nn.Module, *, everything: bool) -> int:
    """Have the layers that a processor is slow at in bfloat16 compute in float32, in place; maps stay in bfloat16.

    On processors without bfloat16 the library behind torch takes about ten times as long for any convolution as in
    float32. With it, it still has no fast gradient for depthwise convolutions of a stride above 1, and takes ten to a
    hundred times as long: a third of a step of a MobileNet.

    Args:
        module: what runs inside autocast.
        everything: whether every convolution and linear layer is slow, or those depthwise convolutions alone.

    Returns:
        How many layers were turned.
    """
    wide: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: WideConv2d, nn.Linear: WideLinear}
    slow = [m for m in module.modules() if type(m) in wide and (everything or _is_strided_depthwise(m))]
    for layer in slow:
        layer.__class__ = wide[type(layer)]
    return len(slow)


def _is_strided_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1 < max(layer.stride)
