"""Frozen teachers: permanent eval mode, no autograd graph, a fast forward; and ensembles of them."""

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

# Values of ONEDNN_MAX_CPU_ISA that disable the instructions for products in bfloat16.
_WITHOUT_BFLOAT16 = {
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_MIC", "AVX512_MIC_4OPS", "AVX512_CORE",
    "AVX512_CORE_VNNI",
}  # fmt: skip


class View(nn.Module):
    """Resize and re-normalise the student's images to what the teacher was trained on.

    x' = resize((x * std + mean - own_mean) / own_std)

    Args:
        mean: of the normalisation of the given images, three numbers.
        std: likewise.
        own_mean: of the normalisation that the network expects, three numbers.
        own_std: likewise.
        size: side of the images that the network expects, in pixels; None to keep the size.

    Raises:
        ValueError: there are not three numbers each, or a std or the size is not positive.
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
        current, own = (torch.tensor([m, s])[:, :, None, None] for m, s in ((mean, std), (own_mean, own_std)))
        self.register_buffer("scale", current[1] / own[1])
        self.register_buffer("shift", (current[0] - own[0]) / own[1])
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, 3, H, W) as (B, 3, size, size)."""
        images = images * self.scale + self.shift
        if self.size is None or images.shape[2:] == (self.size, self.size):
            return images
        return F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)


class Frozen(nn.Module):
    """A network that never trains: in eval mode also after `.train()`, without gradients; it returns `Outputs`.

    It computes in the type of its weights, also in autocast.

    Args:
        model: the network, tapped or not.
        view: applied to its images first, or None.
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
        """Return the `Outputs` for images, see `Taps`, which are cast to the weights' type; without gradients."""
        return self.with_graph(images)

    def with_graph(self, images: Images) -> Outputs:
        """Return the same as `forward`, with a graph if the images require gradients."""
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
    """Copy a network; taps, which have hooks, are created again."""
    if isinstance(network, Taps):
        return Taps(copy.deepcopy(network.model), network.paths)
    if isinstance(network, Frozen):
        return Frozen(_copy(network.taps), copy.deepcopy(network.view))
    assert isinstance(network, Ensemble)
    ensemble = Ensemble([_copy(model) for model in network.models])
    ensemble.weights.copy_(network.weights)
    return ensemble


def _cast(images: Tensor, network: nn.Module) -> Tensor:
    """Cast images to the type of the weights; ensembles cast for each of their networks."""
    return images.to(next(network.parameters(), images).dtype) if isinstance(network, Taps) else images


def freeze(model: nn.Module, view: View | None = None) -> Frozen:
    """Freeze a network, tapped or not, as a teacher; see `Frozen`. A frozen one is returned unchanged."""
    return model if isinstance(model, Frozen) else Frozen(model, view)


# torch.compile cannot trace the query of the processor.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device has bfloat16 products in hardware; only GPUs and x86 CPUs can have them.

    An environment variable can limit oneDNN, torch's library for CPUs, to older instructions: with
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI, no CPU has bfloat16.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""  # the older name
    if device.type != "cpu" or allowed.upper() in _WITHOUT_BFLOAT16:
        return False
    return bool(torch.cpu._is_avx512_bf16_supported())


@torch.no_grad()
def fold_norms(taps: Taps, images: Tensor) -> int:
    """Fold every batch normalisation that directly follows a convolution into its weights, in place.

    w' = w g / sqrt(v + eps), b' = (b - mean) g / sqrt(v + eps) + bias: the same function in eval mode, with one pass
    over each map less. The activation of a norm that includes one, such as timm's, is kept. Compute margins before.
    Modules that are tapped, shared or called twice, and layers with other computations, are not folded; and none are if
    the network's outputs on `images` would change.

    Args:
        taps: the network, which must not be trained afterwards; it is put into eval mode.
        images: (B, 3, H, W), not constant; one image is enough.

    Returns:
        The number of folded norms.
    """
    before = dry_forward(taps, images)
    taps.eval()
    replacements: dict[nn.Module, nn.Module] = {}
    for conv, norm, shape in _conv_norms(taps, images):
        rest = _behind(norm, conv.out_channels)
        if rest is not None and _scales(conv, shape):
            replacements |= {conv: fuse_conv_bn_eval(conv, norm), norm: rest}
    places = [(owner, name, child) for owner in taps.modules() for name, child in owner._modules.items()]
    undo = [(owner, name, child) for owner, name, child in places if child in replacements]
    for owner, name, child in undo:
        owner._modules[name] = replacements[child]
    if _same(before, taps, images):
        return len(replacements) // 2
    for owner, name, child in undo:
        owner._modules[name] = child
    return 0


def _same(before: Outputs, taps: Taps, images: Tensor) -> bool:
    """Return whether a network still has these outputs."""
    try:
        after = dry_forward(taps, images)
    except AttributeError:  # a network that reads its norms' own weights
        return False
    maps = zip([before.logits, *before.features], [after.logits, *after.features], strict=True)
    return all(_close(b, a) for a, b in maps)


def _close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 1e-3 * expected.abs().max())


def _conv_norms(taps: Taps, images: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d, torch.Size]]:
    """Find convolutions whose output is the input of a batch normalisation and of no other module.

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
    """Return the part of a norm after the normalisation, or None if that is not its modules in sequence."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    rest = nn.Sequential(OrderedDict(norm.named_children()))
    values = _waves((2, channels, 3, 3), norm)
    try:
        same = _close(norm(values), rest(nn.BatchNorm2d.forward(norm, values)))
    except (TypeError, RuntimeError, NotImplementedError):  # its modules are not called in sequence, or not at all
        return None
    return rest if same else None


def _scales(conv: nn.Conv2d, shape: torch.Size) -> bool:
    """Return whether a convolution's output scales with its weights per channel, unlike with weight standardisation.

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
    """Return fixed values of both signs up to 10, in the type of a module's weights."""
    tensor = next(itertools.chain(like.parameters(), like.buffers()))
    return 10 * torch.arange(math.prod(shape)).sin().reshape(tuple(shape)).to(tensor)


class Ensemble(nn.Module):
    """Several networks as one: logits = log of the weighted mean of their probabilities; the features of all.

    Args:
        models: networks with the same number of classes, tapped or not.
        weights: one positive factor per network, normalised to sum to 1; None for equal ones.

    Raises:
        ValueError: there are no networks, or the weights do not fit them.
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
