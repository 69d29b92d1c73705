"""timm's Muon, for devices with bfloat16 and without. A separate file, because timm is slow to import."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import Muon
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Float32Muon", "Muon"]


class _InFloat32(TorchFunctionMode):
    """Turn casts to bfloat16 into casts to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and kwargs.get("dtype") is torch.bfloat16:
            kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)


class Float32Muon(Muon):
    """Muon that orthogonalises in float32, for devices without bfloat16.

    timm casts to bfloat16 on every device; if that is emulated, a step of a ResNet-18 takes a minute.
    """

    def step(self, closure: Any = None) -> Any:
        with _InFloat32():
            return Muon.step(self, closure)
