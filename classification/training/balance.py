"""The gradients of the terms of a loss: their shares, and which are not finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from mgd import Outputs, Taps

DROWNING = 200  # times all others; the recommended mgd begins at 45 and learns


def gradient_shares(
    groups: Sequence[tuple[nn.Module, Sequence[str]]],
    values: Mapping[str, Tensor],
    weights: Mapping[str, float],
    scale: Callable[[Tensor], Tensor] = lambda value: value,
) -> dict[str, Tensor]:
    """Return each term's part of the gradient on its network's weights: its norm over the sum of all norms.

    With one term there is nothing to compare, and the result is empty.

    Args:
        groups: each network that trains, and the names of its terms.
        values: raw value of each term, with its graph, which is kept.
        weights: factor of each term.
        scale: scales a loss before its backward: in float16 small gradients would become zeros. Shares stay what they
            are.
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
    """Return each tapped map's part of a term's gradient on its network: its norm over the sum of all norms.

    The gradient of a map is what reaches the weights only through this map, and not through a deeper one that is
    computed from it.

    Args:
        network: that trains.
        maps: as the term read them, one per tap; nothing else is computed from them.
        value: of the term, with its graph, which is kept.

    Returns:
        (number of maps,), all 0 where the term reads none of them.
    """
    if not value.requires_grad:
        return value.new_zeros(len(maps))
    parameters = [p for p in network.parameters() if p.requires_grad]
    norms = [value.new_zeros((), dtype=torch.float32) for _ in maps]
    by_map = torch.autograd.grad(value.mean(), list(maps), retain_graph=True, allow_unused=True)
    for number, (found, of_map) in enumerate(zip(maps, by_map, strict=True)):
        if of_map is not None and found.requires_grad:
            reached = torch.autograd.grad(found, parameters, of_map, retain_graph=True, allow_unused=True)
            norms[number] = torch.stack([g.float().norm() for g in reached if g is not None]).norm()
    total = torch.stack(norms)
    return total / total.sum().clamp_min(1e-30)


@contextlib.contextmanager
def noted_maps(taps: Taps) -> Iterator[list[Tensor]]:
    """Yield a list of the maps of the last forward of tapped networks, each as a tensor of its own.

    Terms then read these tensors, from which nothing else is computed, as `pair_shares` needs.
    """
    maps: list[Tensor] = []

    def rename(_: nn.Module, __: object, outputs: Outputs) -> Outputs:
        maps[:] = [found.view_as(found) for found in outputs.features]
        return Outputs(outputs.logits, list(maps))

    handle = taps.register_forward_hook(rename)
    try:
        yield maps
    finally:
        handle.remove()


def _gradients(value: Tensor, network: nn.Module) -> list[Tensor]:
    """Return the gradients of a value on the weights that it depends on; its graph is kept."""
    if not value.requires_grad:
        return []
    parameters = [p for p in network.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]


def largest_gradient(module: nn.Module) -> Tensor:
    """Return the largest absolute value of the gradients that its weights hold: NaN or inf if one of them is."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None and p.grad.numel()]
    if any(gradient.device.type != "cpu" for gradient in gradients) or not gradients:
        return nn.utils.get_total_norm(gradients, math.inf)
    # Ten times as fast on a processor, whose norm of infinite order reads one number at a time.
    return torch.stack([gradient.abs().amax().float() for gradient in gradients]).amax()


def terms_not_finite(module: nn.Module, values: Mapping[str, Tensor], weights: Mapping[str, float]) -> list[str]:
    """Return the names of the terms whose gradient on what `module` trains is not finite.

    Args:
        module: the distiller.
        values: raw value of each term, with its graph, which is kept.
        weights: factor of each term.
    """
    found = {name: _gradients(weight * values[name].mean(), module) for name, weight in weights.items()}
    return [name for name, gradients in found.items() if not all(bool(g.isfinite().all()) for g in gradients)]


def dominant(weighted: Mapping[str, float]) -> str | None:
    """Return a warning if one term drowns the others: feature losses grow with teacher and image size."""
    name = max(weighted, key=lambda n: weighted[n])
    rest = sum(value for other, value in weighted.items() if other != name)
    if not 0 < DROWNING * rest < weighted[name]:
        return None
    how = f"if the student does not learn, lower its weight with --term {name}.weight=NUMBER"
    return f"!! WARNING: the term {name} is {weighted[name] / rest:.0f} times all others together: {how}"
