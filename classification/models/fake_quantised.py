"""Fake quantisation: a network rounds in float32 as its int8 file will, so that it can adapt by training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

INPUT = "input:0"  # the key of the images
WEIGHTED = (F.conv1d, F.conv2d, F.conv3d, F.linear)
NOT_COUNTED = ("clone", "detach")  # calls that taps add
MAX_LEVEL = 255  # integer of an activation
MAX_WEIGHT_LEVEL = 127  # integer of a weight
NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

Called = Callable[[str, Any, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Sites:
    """The function calls in a network's forward whose results the int8 file rounds.

    The key of a call is the name of the function and its number among the calls of that function, as "relu:3".

    Args:
        tensors: {call whose result is rounded: the names of this result in the ONNX graph}.
        folded: {call of a convolution or linear layer: path of the batch norm that the file folds into it}.
        norms: the calls of these batch norms.
    """

    tensors: Mapping[str, tuple[str, ...]]
    folded: Mapping[str, str]
    norms: frozenset[str]


class CallHook(TorchFunctionMode):
    """Pass every function call of a forward to a function, which returns the result.

    Args:
        called: takes the key of the call, the function that was called, and its arguments.
    """

    def __init__(self, called: Called) -> None:
        super().__init__()
        self.called = called
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in NOT_COUNTED:
            return func(*args, **(kwargs or {}))
        result = self.called(f"{name}:{self.counts[name]}", func, args, kwargs or {})
        # Integer results are not counted: in training only, batch norms count their batches.
        self.counts[name] += isinstance(result, Tensor) and result.is_floating_point()
        return result


class FakeQuantisation(nn.Module):
    """Round activations and weights of a network as its int8 file does, with learned scales.

    Activations: q = clamp(round(x / s) + z, 0, 255), x' = s (q - z), with one s and z per tensor; s = s_0 exp(t), t is
    learned, z is fixed. Weights, after batch norms are folded: s = max |w| / 127 per output channel, z = 0. Gradients
    pass through the rounding where nothing is clamped. Batch norms keep their statistics, so the learning rate must be
    small.

    Args:
        sites: the calls whose results are rounded.

    Reference: Esser et al., 2020, "Learned step size quantization", arXiv:1902.08153; here log s is learned.
    """

    first_scales: Tensor
    zero_points: Tensor

    def __init__(self, sites: Sites) -> None:
        super().__init__()
        self.sites = sites
        self.numbers = {key: number for number, key in enumerate(sites.tensors)}
        self.log_scales = nn.Parameter(torch.zeros(len(self.numbers)))
        self.register_buffer("first_scales", torch.zeros(len(self.numbers)))  # 0: not calibrated
        self.register_buffer("zero_points", torch.zeros(len(self.numbers)))
        self._handles: list[Any] = []
        self._modes: list[CallHook] = []

    @property
    def calibrated(self) -> bool:
        """Whether the scales are set."""
        return bool((self.first_scales > 0).all())

    def describe(self) -> dict[str, tuple[float, int]]:
        """Return {call: (scale, zero point)}, for a checkpoint."""
        scales, zeros = self._scales().tolist(), self.zero_points.tolist()
        return {key: (scales[number], int(zeros[number])) for key, number in self.numbers.items()}

    @torch.no_grad()
    def calibrate(self, network: nn.Module, batches: Iterable[Tensor]) -> None:
        """Set the scales from the smallest and largest values of every rounded tensor on some images.

        s_0 = (max - min) / 255, z = round(-min / s_0), with min <= 0 <= max.

        Args:
            network: in eval mode, not attached.
            batches: normalised images (B, 3, H, W).
        """
        lows, highs = torch.zeros_like(self.first_scales), torch.zeros_like(self.first_scales)

        def called(key: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = func(*args, **kwargs)
            update_range(key, result)
            return result

        def update_range(key: str, result: Any) -> None:
            if (number := self.numbers.get(key)) is not None:
                lows[number] = torch.minimum(lows[number], result.min())
                highs[number] = torch.maximum(highs[number], result.max())

        for images in batches:
            update_range(INPUT, images)
            with CallHook(called):
                network(images)
        self.first_scales.copy_(((highs - lows) / MAX_LEVEL).clamp_min(torch.finfo(torch.float32).tiny))
        self.zero_points.copy_((-lows / self.first_scales).round().clamp(0, MAX_LEVEL))

    def attach(self, network: nn.Module) -> None:
        """Round in every forward of a network from now on, in training and in evaluation."""
        if self._handles:
            return

        def begin(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            scales = self._scales()

            def called(key: str, func: Any, arguments: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return self._round(key, self._compute(module, key, func, arguments, kwargs), scales)

            images = self._round(INPUT, args[0], scales)
            self._modes.append(CallHook(called))
            self._modes[-1].__enter__()  # type: ignore[no-untyped-call]
            return (images, *args[1:])

        def end(module: nn.Module, args: Any, output: Any) -> None:
            self._modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

        self._handles = [
            network.register_forward_pre_hook(begin),
            network.register_forward_hook(end, always_call=True),
        ]

    def _scales(self) -> Tensor:
        return self.first_scales * self.log_scales.exp()

    def _round(self, key: str, result: Any, scales: Tensor) -> Any:
        number = self.numbers.get(key)
        if number is None:
            return result
        part = slice(number, number + 1)
        # This function is private, but torch's own quantisation uses it. Its backward also gives the gradient of s.
        return torch._fake_quantize_learnable_per_tensor_affine(
            result, scales[part], self.zero_points[part], 0, MAX_LEVEL, 1.0
        )

    def _compute(self, network: nn.Module, key: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in WEIGHTED:
            images, weight, bias, *more = _leading_arguments(("input", "weight", "bias"), args, kwargs)
            path = self.sites.folded.get(key)
            if path is not None:
                weight, bias = fold(weight, bias, network.get_submodule(path))
            rest = {name: value for name, value in kwargs.items() if name not in ("input", "weight", "bias")}
            return func(images, round_weight(weight), bias, *more, **rest)
        if func is F.batch_norm:
            if key in self.sites.norms:
                return args[0] if args else kwargs["input"]
            return F.batch_norm(**{**dict(zip(NORM_ARGUMENTS, args, strict=False)), **kwargs, "training": False})
        return func(*args, **kwargs)


def round_weight(weight: Tensor) -> Tensor:
    """Round a weight (O, ...) to 255 values per output channel: s = max |w| / 127, w' = s round(w / s)."""
    largest = weight.detach().abs().flatten(1).amax(1)
    scale = (largest / MAX_WEIGHT_LEVEL).clamp_min(torch.finfo(weight.dtype).tiny)
    zeros = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -MAX_WEIGHT_LEVEL, MAX_WEIGHT_LEVEL)


def fold(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Fold a batch norm into the weight (O, ...) and bias (O,) before it: w g / d, (b - m) g / d + h.

    d = sqrt(variance + epsilon); m, g and h are the norm's mean, weight and bias.
    """
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None and norm.running_var is not None
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    shift = shift * factor
    folded = weight * factor.view(-1, *[1] * (weight.ndim - 1))
    return folded, shift if norm.bias is None else shift + norm.bias


def _leading_arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments called `names`, which come first in the signature, then the other positional ones."""
    return [*args[: len(names)], *(kwargs.get(name) for name in names[len(args) :]), *args[len(names) :]]
