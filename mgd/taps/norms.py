"""Find the batch normalisation before a tap by running the network; margins from its statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mgd.taps.paths import TapPoint
from mgd.taps.taps import Images, Taps, dry_forward

Norm = nn.BatchNorm2d | nn.SyncBatchNorm


def norms_before(taps: Taps, images: Images) -> list[Norm | None]:
    """Find the batch normalisation before each tap, whose output is the tapped map, or a summand of it.

    It is the last layer with weights (convolution, linear or normalisation) that ran before the tap was read, if that
    is a `BatchNorm2d` of the map's shape, and changes of its output appear unchanged in the map, pixel by pixel: only
    sums and modules without effect in eval mode lie in between. After an activation, a pool or a scale, it is None, and
    margins must be measured on the map. After a residual sum, it is the norm of the branch, as in the published code;
    if the shortcut has a norm, too (a stage of one block), it is the one that ran last.

    A norm that includes its activation, such as timm's, counts if the tap lies before it ("stem.bn1.act@in").

    Args:
        taps: the tapped network.
        images: (B, 3, H, W), any content; one image is enough.

    Returns:
        One `BatchNorm2d`, or `SyncBatchNorm`, or None per tap.
    """
    dry_forward(taps, images)  # the first forward may also run the network on images of other sizes
    trace = _Trace(taps)
    try:
        maps = dry_forward(taps, images).features
    finally:
        trace.close()
    norms: list[Norm | None] = []
    for number, (point, tensor) in enumerate(zip(taps.points, maps, strict=True)):
        last = trace.last_before(number, point)
        if (
            last is None
            or last.norm.num_features != tensor.shape[1]
            or not _carries(taps, images, last, number, tensor)
        ):
            norms.append(None)
        else:
            norms.append(last.norm)
    return norms


def bn_margin(bn: Norm) -> Tensor:
    """Return the expected negative response of each channel after a batch normalisation.

    With s = |weight| and m = bias, the responses are assumed to be N(m, s^2). If Phi(-m/s) > 0.001,
    margin = E[x | x < 0] = m - s phi(m/s) / Phi(-m/s); else margin = -3 s; if s = 0, margin = min(m, 0).

    Args:
        bn: batch normalisation of T channels, its weights loaded; without affine weights m = 0 and s = 1.

    Returns:
        (T,), detached, in the type and on the device of the weights; computed in float64.

    Raises:
        TypeError: the layer is not a batch normalisation.

    Reference: Heo et al., 2019, arXiv:1904.01866, section 3.2.
    """
    if not hasattr(bn, "running_var"):
        raise TypeError(f"bn_margin needs a batch normalisation; got a {type(bn).__name__}")
    if bn.weight is None:
        return torch.full((bn.num_features,), -math.sqrt(2 / math.pi))
    scale = bn.weight.detach().double().abs()
    mean = bn.bias.detach().double()
    ratio = mean / scale.masked_fill(scale == 0, 1)
    below = torch.special.ndtr(-ratio)
    density = torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
    expected = mean - scale * density / below.clamp_min(1e-12)
    margin = torch.where(below > 1e-3, expected, -3 * scale)
    margin = torch.where(scale == 0, mean.clamp_max(0), margin)
    return margin.to(bn.weight.dtype)


@dataclass(frozen=True)
class _Call:
    """One call of a norm, and the module at which its values before any activation can be read."""

    norm: Norm
    place: nn.Module
    reads_input: bool
    number: int  # of the calls of `place`


class _Trace:
    """Record the layers with weights in a forward, and which was the last one when a tap was read."""

    def __init__(self, taps: Taps) -> None:
        self._layers: list[_Call | None] = []  # None for other layers than plain norms
        self._num_before: list[list[int]] = [[] for _ in taps.points]  # layers before each call of a tap
        self._handles: list[Any] = []
        for module in taps.model.modules():
            if isinstance(module, Norm):
                self._follow_norm(module)
            elif next(module.parameters(recurse=False), None) is not None:
                self._handles.append(module.register_forward_hook(lambda *_: self._layers.append(None)))
        for number, point in enumerate(taps.points):
            note = lambda *_, n=number: self._num_before[n].append(len(self._layers))  # noqa: E731
            self._handles.append(_hook(point.module, point.reads_input, note))

    def _follow_norm(self, norm: Norm) -> None:
        inner = next(norm.children(), norm)  # a norm with an activation passes its values to a child
        reads_input, calls = inner is not norm, 0
        expected: list[Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if type(norm) is not nn.BatchNorm2d:
                expected[:] = [nn.modules.batchnorm._BatchNorm.forward(norm, *args, **kwargs)]

        def at(_: nn.Module, args: tuple[Any, ...], *out: Tensor) -> None:
            nonlocal calls
            plain = not expected or _alike(args[0] if reads_input else out[0], expected.pop(), 1e-3)
            self._layers.append(_Call(norm, inner, reads_input, calls) if plain else None)
            calls += 1

        self._handles.append(norm.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(_hook(inner, reads_input, at))

    def last_before(self, number: int, point: TapPoint) -> _Call | None:
        """Return the norm that ran last before a tap was read, or None if another layer did."""
        position = self._num_before[number][-1 if point.call is None else point.call]
        return self._layers[position - 1] if position else None

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _carries(taps: Taps, images: Images, last: _Call, number: int, before: Tensor) -> bool:
    """Return whether random changes of a norm's values at each pixel appear unchanged in the tapped map.

    The changes are a hundred times the map's values, to detect also activations that only limit large values.
    """
    generator = torch.Generator().manual_seed(0)
    size = 100 * float(before.abs().max()) + 100
    change = (size * torch.randn(before.shape, generator=generator)).to(before)
    calls = 0

    def shift(value: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        here = calls - 1 == last.number and value.shape == change.shape
        return value + change.to(value.device) if here else value

    if last.reads_input:
        handle = last.place.register_forward_pre_hook(lambda _, args: (shift(args[0]), *args[1:]), prepend=True)
    else:
        handle = last.place.register_forward_hook(lambda _, args, out: shift(out), prepend=True)
    try:
        after = dry_forward(taps, images).features[number]
    finally:
        handle.remove()
    return after.shape == before.shape and _alike(after - before, change, 1e-2)


def _alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())


def _hook(module: nn.Module, reads_input: bool, call: Callable[..., None]) -> Any:
    return module.register_forward_pre_hook(call) if reads_input else module.register_forward_hook(call)
