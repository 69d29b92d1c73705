"""Frozen teachers: eval mode that stays, no autograd graph, a fast forward, several as one."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mgd.checks import check_positive
from mgd.taps import Outputs, Taps, dry_forward
from mgd.taps.taps import Images, device_of

# Values of ONEDNN_MAX_CPU_ISA that leave out the instructions that multiply bfloat16.
_WITHOUT_BFLOAT16 = {
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_MIC", "AVX512_MIC_4OPS", "AVX512_CORE",
    "AVX512_CORE_VNNI",
}  # fmt: skip


class View(nn.Module):
    """Resize and re-normalise the student's images to what the teacher was trained on.

    x' = resize((x * std + mean - own_mean) / own_std)

    Args:
        mean: three numbers that the given images were normalised with.
        std: likewise.
        own_mean: three numbers that the network expects.
        own_std: likewise.
        size: side of the square that it expects, in pixels; None for the given one.

    Raises:
        ValueError: other than three numbers, a std or size that is not positive.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        own_mean: Sequence[float],
        own_std: Sequence[float],
        size: int | None = None,
    ) -> None:
        super().__init__()
        if any(len(numbers) != 3 for numbers in (mean, std, own_mean, own_std)) or (size is not None and size < 1):
            raise ValueError(f"View needs three numbers each, and a positive size; got {mean=}, {own_mean=}, {size=}")
        for value in (*std, *own_std):
            check_positive("View", std=value)
        given, own = (torch.tensor([m, s])[:, :, None, None] for m, s in ((mean, std), (own_mean, own_std)))
        self.register_buffer("scale", given[1] / own[1])
        self.register_buffer("shift", (given[0] - own[0]) / own[1])
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, 3, H, W) as (B, 3, size, size)."""
        images = images * self.scale + self.shift
        if self.size is None or images.shape[2:] == (self.size, self.size):
            return images
        return F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)


class Frozen(nn.Module):
    """A network that never trains: eval mode survives `.train()`, no gradient, no graph; it returns `Outputs`.

    It computes in the type of its weights, also inside autocast.

    Args:
        model: the network, tapped or not.
        view: what its images pass first, or None.
    """

    def __init__(self, model: nn.Module, view: View | None = None) -> None:
        super().__init__()
        self.view = view
        self.taps = model if isinstance(model, (Taps, Ensemble)) else Taps(model)
        self._copies: dict[torch.device, Frozen] = {}
        self.requires_grad_(False)
        self.taps.eval()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_copies": {}}  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Frozen:
        """Stay in eval mode."""
        return self

    @torch.no_grad()
    def forward(self, images: Images) -> Outputs:
        """Return the `Outputs` for images as `Taps` takes them, cast to the weights' type; none requires a gradient."""
        return self.with_graph(images)

    def with_graph(self, images: Images) -> Outputs:
        """Return what `forward` does, with the graph behind it where the images require a gradient."""
        device = device_of(images)
        own = self._on(device)
        if isinstance(images, Tensor):
            images = _cast(images if own.view is None else own.view(images), own.taps)
        else:
            images = [_cast(image if own.view is None else own.view(image[None])[0], own.taps) for image in images]
        with torch.autocast(device.type, enabled=False):
            outputs: Outputs = own.taps(images)
        return outputs

    def _on(self, device: torch.device) -> Frozen:
        """Return this teacher on `device`, copied there once: DataParallel calls one teacher from many devices."""
        weight = next(self.taps.parameters(), None)
        if weight is None or weight.device == device:
            return self
        if device not in self._copies:
            self._copies[device] = Frozen(_copy(self.taps), copy.deepcopy(self.view)).to(device)
        return self._copies[device]


def _copy(network: nn.Module) -> nn.Module:
    """Copy a network; taps hold hooks, and are set anew."""
    if isinstance(network, Taps):
        return Taps(copy.deepcopy(network.model), network.paths)
    if isinstance(network, Frozen):
        return Frozen(_copy(network.taps), copy.deepcopy(network.view))
    assert isinstance(network, Ensemble)
    found = Ensemble([_copy(model) for model in network.models])
    found.weights.copy_(network.weights)
    return found


def _cast(images: Tensor, network: nn.Module) -> Tensor:
    """Give `images` the type of the weights; what holds networks of its own casts for each."""
    return images.to(next(network.parameters(), images).dtype) if isinstance(network, Taps) else images


def freeze(model: nn.Module, view: View | None = None) -> Frozen:
    """Freeze a network, tapped (`Taps`) or not, as a teacher, its images passing `view`; twice changes nothing."""
    return model if isinstance(model, Frozen) else Frozen(model, view)


# torch.compile does not trace how torch asks the processor.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 in hardware: a GPU, or an x86 processor; else False.

    oneDNN, the library behind torch on a processor, can be kept to older instructions by an environment variable:
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI makes any processor one without bfloat16.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""  # the latter is older
    if device.type != "cpu" or allowed.upper() in _WITHOUT_BFLOAT16:
        return False
    return bool(torch.cpu._is_avx512_bf16_supported())


@torch.no_grad()
def fold_norms(taps: Taps, images: Tensor) -> int:
    """Fold every batch normalisation that directly follows a convolution into its weights, in place.

    w' = w g / sqrt(v + eps), b' = (b - mean) g / sqrt(v + eps) + bias: the same function in eval mode, with one pass
    over each map less. Of a norm that activates what it normalised, as timm's, the activation stays. Take margins
    before. Left alone are modules that are tapped, shared or called twice, layers that compute something else, and a
    network whose outputs on `images` would change.

    Args:
        taps: the network, never to be trained again: it is put into eval mode.
        images: (B, 3, H, W) of more than one value; one image is enough.

    Returns:
        How many were folded.
    """
    before = dry_forward(taps, images)
    taps.eval()
    instead: dict[nn.Module, nn.Module] = {}
    for conv, norm, shape in _conv_norms(taps, images):
        rest = _behind(norm, conv.out_channels)
        if rest is not None and _scales(conv, shape):
            instead |= {conv: fuse_conv_bn_eval(conv, norm), norm: rest}
    places = [(owner, name, child) for owner in taps.modules() for name, child in owner._modules.items()]
    undo = [(owner, name, child) for owner, name, child in places if child in instead]
    for owner, name, child in undo:
        owner._modules[name] = instead[child]
    if _same(before, taps, images):
        return len(instead) // 2
    for owner, name, child in undo:
        owner._modules[name] = child
    return 0


def _same(before: Outputs, taps: Taps, images: Tensor) -> bool:
    """Whether a network still gives these outputs."""
    try:
        after = dry_forward(taps, images)
    except AttributeError:  # a network that reads its norms' own weights
        return False
    maps = zip([before.logits, *before.features], [after.logits, *after.features], strict=True)
    return all(_close(b, a) for a, b in maps)


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-3 * expected.abs().max())


def _conv_norms(taps: Taps, images: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d, torch.Size]]:
    """Find convolutions whose output goes to a batch normalisation and, as far as modules show, nowhere else.

    Returns:
        Convolution, norm, and the shape of the convolution's input.
    """
    tapped = {point.module for point in taps.points}
    outputs: list[tuple[nn.Module, Tensor, torch.Size]] = []
    readers: list[tuple[nn.Module, Tensor]] = []
    handles = []

    def write(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        outputs.append((module, out, next(iter([*args, *kwargs.values()])).shape))

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        readers.extend((module, value) for value in [*args, *kwargs.values()] if isinstance(value, Tensor))

    for module in taps.model.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(write, with_kwargs=True))
        if next(module.children(), None) is None or isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(read, with_kwargs=True))
    try:
        dry_forward(taps, images)
    finally:
        for handle in handles:
            handle.remove()
    calls = [module for module, _, _ in outputs] + [m for m, _ in readers if isinstance(m, nn.BatchNorm2d)]
    pairs = []
    for conv, out, shape in outputs:
        behind = [module for module, tensor in readers if tensor is out]
        if len(behind) != 1 or not isinstance(behind[0], nn.BatchNorm2d) or behind[0].running_mean is None:
            continue
        once = calls.count(conv) == 1 and calls.count(behind[0]) == 1
        if once and not tapped & {conv, behind[0]}:
            pairs.append((conv, behind[0], shape))
    return pairs  # type: ignore[return-value]


def _behind(norm: nn.BatchNorm2d, channels: int) -> nn.Module | None:
    """Return what a norm does behind normalising, None where that is not to pass it through its modules in turn."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    rest = nn.Sequential(OrderedDict(norm.named_children()))
    values = _waves((2, channels, 3, 3), norm)
    try:
        same = _close(norm(values), rest(nn.BatchNorm2d.forward(norm, values)))
    except (TypeError, RuntimeError, NotImplementedError):  # modules that are not called in turn, or not at all
        return None
    return rest if same else None


def _scales(conv: nn.Conv2d, shape: torch.Size) -> bool:
    """Whether a convolution's output scales with its weights, channel by channel, as not those that standardise them.

    Args:
        conv: the convolution.
        shape: of its input.
    """
    if type(conv) is nn.Conv2d:
        return True
    norm = nn.BatchNorm2d(conv.out_channels).to(conv.weight).eval()
    for values, low, high in ((norm.weight, 0.5, 2.0), (norm.bias, -1.0, 1.0), (norm.running_mean, 0.3, -0.3)):
        assert values is not None
        values.copy_(torch.linspace(low, high, len(values)))
    values = _waves(shape, conv)
    return _close(fuse_conv_bn_eval(conv, norm)(values), norm(conv(values)))


def _waves(shape: Sequence[int], like: nn.Module) -> Tensor:
    """Return values of both signs up to 10, in the type of a module's weights: the same ones every time."""
    tensor = next(itertools.chain(like.parameters(), like.buffers()))
    return 10 * torch.arange(math.prod(shape)).sin().reshape(tuple(shape)).to(tensor)


class Ensemble(nn.Module):
    """Several networks as one: logits = log of the weighted mean of their probabilities; features side by side.

    Args:
        models: networks of one number of classes, tapped or not.
        weights: one positive factor a network; None for equal ones. They are normalised to sum to 1.

    Raises:
        ValueError: no networks, or weights that do not fit them.
    """

    weights: Tensor

    def __init__(self, models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(models) if weights is None else list(weights)
        if not models or len(weights) != len(models) or not all(0 < weight < inf for weight in weights):
            raise ValueError(f"expected one positive weight per network; got {weights} for {len(models)} networks")
        self.models = nn.ModuleList(m if isinstance(m, (Taps, Frozen)) else Taps(m) for m in models)
        self.register_buffer("weights", torch.tensor(weights) / sum(weights))

    def forward(self, images: Tensor) -> Outputs:
        """Return the joint `Outputs` for `images` (B, 3, H, W)."""
        outputs: list[Outputs] = [model(_cast(images, model)) for model in self.models]
        shapes = [tuple(o.logits.shape) for o in outputs]
        if len(shapes[0]) != 2 or len(set(shapes)) > 1:
            raise ValueError(f"an Ensemble needs logits (B, K) of one number of classes; got {shapes}")
        log_p = torch.stack([o.logits.float().log_softmax(1) for o in outputs])  # (N, B, K)
        logits = torch.logsumexp(log_p + self.weights.log()[:, None, None], dim=0)
        return Outputs(logits, [feature for o in outputs for feature in o.features])
