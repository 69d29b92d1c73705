"""How the terms of a loss share the gradient on the student, and weights that would make them equal."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def gradient_shares(
    student: nn.Module, values: Mapping[str, Tensor], weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return each term's part of the gradient on the student's weights: its norm over the sum of all norms.

    With one term there is nothing to compare, and the result is empty.

    Args:
        student: the network whose weights are meant.
        values: raw value of each term, with its graph, which is kept.
        weights: factor of each term.
    """
    if len(weights) == 1:
        return {}
    parameters = [p for p in student.parameters() if p.requires_grad]
    norms = {}
    for name, weight in weights.items():
        value = weight * values[name].mean()
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        norms[name] = torch.stack([g.float().norm() for g in gradients if g is not None] or [value * 0]).norm()
    total = torch.stack(list(norms.values())).sum().clamp_min(1e-30)
    return {name: norm / total for name, norm in norms.items()}


def balanced(weights: Mapping[str, float], shares: Mapping[str, float]) -> dict[str, float]:
    """Return weights with which every term has an equal share; the first keeps its own, as does a term of share 0."""
    first = next(iter(weights))
    return {n: w * shares[first] / shares[n] if shares[n] > 0 else w for n, w in weights.items()}


def dominant(weighted: Mapping[str, float]) -> str | None:
    """Return a warning of a term that drowns the others: feature losses scale with teacher and image size."""
    name = max(weighted, key=lambda n: weighted[n])
    rest = sum(value for other, value in weighted.items() if other != name)
    if not 0 < 30 * rest < weighted[name]:
        return None
    how = "raise --loss-factor" if name == "mgd" else "lower its weight"
    return f"!! WARNING: the term {name} is {weighted[name] / rest:.0f} times all others together: {how}"
