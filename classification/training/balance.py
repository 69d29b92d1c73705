"""The gradients of a loss's terms: their shares, and which ones are not finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from mgd import Outputs, Taps

DROWNING = 200  # times all other terms together; the recommended mgd starts at 45, and the student learns


def gradient_shares(
    groups: Sequence[tuple[nn.Module, Sequence[str]]],
    values: Mapping[str, Tensor],
    weights: Mapping[str, float],
    scale: Callable[[Tensor], Tensor] = lambda value: value,
) -> dict[str, Tensor]:
    """Return each term's share of the gradient of its network's weights: its norm divided by the sum of all norms.

    A network with only one term has no shares.

    Args:
        groups: each network that trains, and the names of its terms.
        values: raw value of each term, with its graph, which is kept.
        weights: factor of each term.
        scale: scales a loss before its backward, because small gradients would become 0 in float16. Shares do not
            change.
    """
    shares: dict[str, Tensor] = {}
    for network, names in groups:
        norms = {}
        for name in names if len(names) > 1 else ():
            value = scale(weights[name] * values[name].mean())
            gradients = _gradients(value, network)
            norms[name] = torch.stack([g.float().norm() for g in gradients] or [value * 0]).norm()
        total = sum(norms.values(), torch.tensor(0.0)).clamp_min(1e-30)
        shares |= {name: norm / total for name, norm in norms.items()}
    return shares


def pair_shares(network: nn.Module, maps: Sequence[Tensor], value: Tensor) -> Tensor:
    """Return each tapped map's share of a term's gradient: its norm divided by the sum of all norms.

    The gradient of a map is the part that reaches the weights directly through this map, not through a deeper one that
    is computed from it.

    Args:
        network: the network that trains.
        maps: as the term read them, one per tap; nothing else is computed from them.
        value: of the term, with its graph, which is kept.

    Returns:
        (number of maps,), all 0 if the term reads none of them.
    """
    if not value.requires_grad:
        return value.new_zeros(len(maps))
    parameters = [p for p in network.parameters() if p.requires_grad]
    norms = [value.new_zeros((), dtype=torch.float32) for _ in maps]
    by_map = torch.autograd.grad(value.mean(), list(maps), retain_graph=True, allow_unused=True)
    for number, (tapped, gradient) in enumerate(zip(maps, by_map, strict=True)):
        if gradient is not None and tapped.requires_grad:
            through = torch.autograd.grad(tapped, parameters, gradient, retain_graph=True, allow_unused=True)
            norms[number] = torch.stack([g.float().norm() for g in through if g is not None]).norm()
    total = torch.stack(norms)
    return total / total.sum().clamp_min(1e-30)


@contextlib.contextmanager
def noted_maps(taps: Taps) -> Iterator[list[Tensor]]:
    """Yield a list that holds the maps of the last forward, each as a separate tensor.

    Terms then read these tensors, and nothing else is computed from them, as `pair_shares` requires.
    """
    maps: list[Tensor] = []

    def separate(_: nn.Module, __: object, outputs: Outputs) -> Outputs:
        maps[:] = [feature.view_as(feature) for feature in outputs.features]
        return Outputs(outputs.logits, list(maps))

    handle = taps.register_forward_hook(separate)
    try:
        yield maps
    finally:
        handle.remove()


def _gradients(value: Tensor, network: nn.Module) -> list[Tensor]:
    """Return the gradients of a value for the weights that it depends on; its graph is kept."""
    if not value.requires_grad:
        return []
    parameters = [p for p in network.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]


def largest_gradient(module: nn.Module) -> Tensor:
    """Return the largest absolute value of all gradients of a module, as a scalar; NaN or inf if one is."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None and p.grad.numel()]
    if any(gradient.device.type != "cpu" for gradient in gradients) or not gradients:
        return nn.utils.get_total_norm(gradients, math.inf)
    # Ten times as fast on a CPU, where torch's norm of infinite order is slow.
    return torch.stack([gradient.abs().amax().float() for gradient in gradients]).amax()


def terms_not_finite(module: nn.Module, values: Mapping[str, Tensor], weights: Mapping[str, float]) -> list[str]:
    """Return the names of the terms whose gradients for the weights of `module` are not finite.

    Args:
        module: the distiller.
        values: raw value of each term, with its graph, which is kept.
        weights: factor of each term.
    """
    by_term = {name: _gradients(weight * values[name].mean(), module) for name, weight in weights.items()}
    return [name for name, gradients in by_term.items() if not all(bool(g.isfinite().all()) for g in gradients)]


def dominant(weighted: Mapping[str, float]) -> str | None:
    """Return a warning if one term is far larger than all others; feature losses grow with teacher and image size."""
    name = max(weighted, key=lambda n: weighted[n])
    rest = sum(value for other, value in weighted.items() if other != name)
    if not 0 < DROWNING * rest < weighted[name]:
        return None
    how = f"if the student does not learn, lower its weight with --term {name}.weight=NUMBER"
    return f"!! WARNING: the term {name} is {weighted[name] / rest:.0f} times all others together: {how}"
