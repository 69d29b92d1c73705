"""Mixed precision: autocast, and layers that are faster in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mgd import has_bfloat16


class MixedPrecision(nn.Module):
    """Autocast inside the module that is wrapped: the threads of DataParallel do not inherit its type.

    The logits lose their graph: DDP waits for the gradient of every weight that an output depends on, and only the
    terms have one to give.

    Args:
        module: what to run.
        device: whose autocast.
        kind: "off", "bf16" or "fp16".
        bfloat16: whether the device has it; what it says by default.
    """

    def __init__(self, module: nn.Module, device: torch.device, kind: str, bfloat16: bool | None = None) -> None:
        super().__init__()
        self.module, self.device_type, self.kind, self._bfloat16 = module, device.type, kind, bfloat16

    def forward(self, *inputs: Any) -> Any:
        with autocast(self.device_type, self.kind, self._bfloat16):
            values = self.module(*inputs)
        return {**values, "logits": values["logits"].detach()} if isinstance(values, dict) else values


def autocast(device_type: str, kind: str, bfloat16: bool | None = None) -> torch.autocast:
    """Return the context of "bf16" or "fp16", or one that does nothing.

    It does nothing for "off", and for "bf16" on a device without bfloat16: there every product (convolutions, linear
    layers, attention, einsum) is emulated, and takes ten to fifty times as long as in float32.
    """
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    enabled = kind != "off" and not lacks(torch.device(device_type), kind, bfloat16)
    return torch.autocast(device_type, dtype, enabled=enabled)


def lacks(device: torch.device, kind: str, bfloat16: bool | None = None) -> bool:
    """Whether "bf16" is asked for on a device without bfloat16, so that all is computed in float32."""
    return kind == "bf16" and not (has_bfloat16(device) if bfloat16 is None else bfloat16)


class WideConv2d(nn.Conv2d):
    """A convolution in float32 inside autocast, its output as its input's type."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return super().forward(images.float()).to(images.dtype)


def widen(module: nn.Module) -> int:
    """Replace the depthwise convolutions of a stride above 1 by `WideConv2d`s with the same weights; return how many.

    On a processor with bfloat16 the library behind torch has no fast gradient for them, and takes ten to a hundred
    times as long as in float32: a third of a step of a MobileNet.

    Args:
        module: a network that is not tapped yet.
    """
    wide = {layer: _wide(layer) for layer in module.modules() if _is_strided_depthwise(layer)}
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if child in wide:
                setattr(parent, name, wide[child])
    return len(wide)


def _wide(layer: nn.Module) -> WideConv2d:
    assert isinstance(layer, nn.Conv2d)
    how = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    wide = WideConv2d(**{name: getattr(layer, name) for name in how}, bias=layer.bias is not None, device="meta")
    wide.weight, wide.bias = layer.weight, layer.bias
    return wide.train(layer.training)


def _is_strided_depthwise(layer: nn.Module) -> bool:
    return type(layer) is nn.Conv2d and layer.groups == layer.in_channels > 1 < max(layer.stride)
