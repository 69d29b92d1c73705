"""Fake quantisation: a network computes in float32 what its int8 file will compute, so that it can train for it."""

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
UNCOUNTED = ("clone", "detach")  # what taps do to keep a map
LARGEST = 255  # of an activation, in steps
LARGEST_WEIGHT = 127
NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

Called = Callable[[str, Any, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Sites:
    """Where the int8 file of a network rounds, by calls of its forward.

    A call is named by its function and its number among the calls of that function, as "relu:3".

    Args:
        tensors: {call whose result is rounded: the tensors of the ONNX graph that are this result}.
        folded: {call of a convolution or linear layer: path of the batch norm that the file folds into it}.
        norms: the calls of these batch norms.
    """

    tensors: Mapping[str, tuple[str, ...]]
    folded: Mapping[str, str]
    norms: frozenset[str]


class Calls(TorchFunctionMode):
    """Hand every call of a forward to a function, which returns its result.

    Args:
        called: takes the call's key, the function that was called, and its arguments.
    """

    def __init__(self, called: Called) -> None:
        super().__init__()
        self.called = called
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in UNCOUNTED:
            return func(*args, **(kwargs or {}))
        result = self.called(f"{name}:{self.counts[name]}", func, args, kwargs or {})
        # Counters of batches, which norms raise in training only, are whole numbers.
        self.counts[name] += isinstance(result, Tensor) and result.is_floating_point()
        return result


class FakeQuantisation(nn.Module):
    """Round activations and weights of a network as its int8 file does, with scales that are learned.

    Activations: q = clamp(round(x / s) + z, 0, 255), x' = s (q - z), with one s and z per tensor; s = s_0 exp(t), t is
    learned, z stays. Weights, batch norms folded: s = max |w| / 127 per output channel, z = 0. Gradients pass through
    the rounding where nothing is clamped. Batch norms keep their statistics, so that rates
    must be small.

    Args:
        sites: where.

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
        self._modes: list[Calls] = []

    @property
    def calibrated(self) -> bool:
        """Whether there are scales."""
        return bool((self.first_scales > 0).all())

    def describe(self) -> dict[str, tuple[float, int]]:
        """Return {call: (scale, zero point)}, for a checkpoint."""
        scales, zeros = self._scales().tolist(), self.zero_points.tolist()
        return {key: (scales[number], int(zeros[number])) for key, number in self.numbers.items()}

    @torch.no_grad()
    def calibrate(self, network: nn.Module, batches: Iterable[Tensor]) -> None:
        """Set the scales from the smallest and largest values that images give at every site.

        s_0 = (max - min) / 255, z = round(-min / s_0), where min is at most and max at least 0.

        Args:
            network: in eval mode, not attached.
            batches: normalised images (B, 3, H, W).
        """
        lows, highs = torch.zeros_like(self.first_scales), torch.zeros_like(self.first_scales)

        def called(key: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = func(*args, **kwargs)
            look(key, result)
            return result

        def look(key: str, result: Any) -> None:
            if (number := self.numbers.get(key)) is not None:
                lows[number] = torch.minimum(lows[number], result.min())
                highs[number] = torch.maximum(highs[number], result.max())

        for images in batches:
            look(INPUT, images)
            with Calls(called):
                network(images)
        self.first_scales.copy_(((highs - lows) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny))
        self.zero_points.copy_((-lows / self.first_scales).round().clamp(0, LARGEST))

    def attach(self, network: nn.Module) -> None:
        """Round in every forward of a network from now on, in training and evaluation."""
        if self._handles:
            return

        def begin(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            scales = self._scales()

            def called(key: str, func: Any, given: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return self._round(key, self._compute(module, key, func, given, kwargs), scales)

            images = self._round(INPUT, args[0], scales)
            self._modes.append(Calls(called))
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
        # A private name of torch, which its own quantisation stands on: its backward gives the gradient of s, too.
        return torch._fake_quantize_learnable_per_tensor_affine(
            result, scales[part], self.zero_points[part], 0, LARGEST, 1.0
        )

    def _compute(self, network: nn.Module, key: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in WEIGHTED:
            images, weight, bias, *more = _bind(("input", "weight", "bias"), args, kwargs)
            path = self.sites.folded.get(key)
            if path is not None:
                weight, bias = fold(weight, bias, network.get_submodule(path))
            rest = {name: value for name, value in kwargs.items() if name not in ("input", "weight", "bias")}
            return func(images, round_weight(weight), bias, *more, **rest)
        if func is F.batch_norm:
            if key in self.sites.norms:
                return args[0] if args else kwargs["input"]
            return F.batch_norm(**{**dict(zip(NORM, args, strict=False)), **kwargs, "training": False})
        return func(*args, **kwargs)


def round_weight(weight: Tensor) -> Tensor:
    """Round a weight (O, ...) to 255 values per output channel: s = max |w| / 127, w' = s round(w / s)."""
    largest = weight.detach().abs().flatten(1).amax(1)
    scale = (largest / LARGEST_WEIGHT).clamp_min(torch.finfo(weight.dtype).tiny)
    zeros = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -LARGEST_WEIGHT, LARGEST_WEIGHT)


def fold(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Fold a batch norm into the weight (O, ...) and bias (O,) in front of it: w g / d, (b - m) g / d + h.

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


def _bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return arguments in the order of a function's first names, and what was passed by position behind them."""
    return [*args[: len(names)], *(kwargs.get(name) for name in names[len(args) :]), *args[len(names) :]]
