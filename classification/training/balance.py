"""The gradients of the terms of a loss: their shares, and which are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


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


def _gradients(value: Tensor, network: nn.Module) -> list[Tensor]:
    """Return the gradients of a value on the weights that it depends on; its graph is kept."""
    if not value.requires_grad:
        return []
    parameters = [p for p in network.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]


def largest_gradient(module: nn.Module) -> Tensor:
    """Return the largest absolute value of the gradients that its weights hold: NaN or inf where one is."""
    return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None], math.inf)


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
    """Return a warning of a term that drowns the others: feature losses scale with teacher and image size."""
    name = max(weighted, key=lambda n: weighted[n])
    rest = sum(value for other, value in weighted.items() if other != name)
    if not 0 < 30 * rest < weighted[name]:
        return None
    how = f"if the student does not learn, lower its weight by --term {name}.weight=NUMBER"
    return f"!! WARNING: the term {name} is {weighted[name] / rest:.0f} times all others together: {how}"
