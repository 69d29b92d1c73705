"""Mixed precision: autocast, and layers that are faster in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mgd import has_bfloat16


class MixedPrecision(nn.Module):
    """Run a module in autocast, inside of DDP or DataParallel: threads of DataParallel do not inherit the context.

    The logits are detached: DDP waits for gradients of all weights that an output depends on, and backward starts from
    the loss only.

    Args:
        module: returns a dictionary with "loss" and "logits", or anything else.
        device: of the module.
        kind: "off", "bf16" or "fp16".
        bfloat16: whether the device has it; None to ask the device.
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

    It does nothing for "off", nor for "bf16" on a device without bfloat16: products (convolutions, linear layers,
    attention, einsum) would be emulated there, ten to fifty times slower than in float32.
    """
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    enabled = kind != "off" and not lacks(torch.device(device_type), kind, bfloat16)
    return torch.autocast(device_type, dtype, enabled=enabled)


def lacks(device: torch.device, kind: str, bfloat16: bool | None = None) -> bool:
    """Return whether "bf16" was chosen on a device without bfloat16, so that float32 is used."""
    return kind == "bf16" and not (has_bfloat16(device) if bfloat16 is None else bfloat16)


class WideConv2d(nn.Conv2d):
    """A convolution that computes in float32 also inside autocast; its output has the type of its input."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return super().forward(images.float()).to(images.dtype)


def widen(module: nn.Module) -> int:
    """Replace depthwise convolutions with a stride above 1 by `WideConv2d` with the same weights; return their number.

    On a CPU, their gradient in bfloat16 takes ten to a hundred times as long as in float32, because oneDNN has no fast
    version of it: a third of a step of a MobileNet.

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
