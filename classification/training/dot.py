"""DOT: SGD with separate momenta for the gradient of the labels and that of the teachers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from classification.runs.world import World


class DOT(torch.optim.Optimizer):
    """SGD with a lower momentum for the gradient of the labels, and a higher one for that of the teachers.

    v <- (mu - delta) v + g + lambda w for the labels, u <- (mu + delta) u + h for the teachers, w <- w - eta (v + u)

    h, the gradient of the terms that read teachers, is recorded by `note` before a step; g is `.grad` minus h. A weight
    that no such term reaches has the momentum mu.

    Args:
        groups: as in any optimizer; a group may have its own `delta`.
        lr: eta.
        momentum: mu.
        delta: half of the difference of the momenta.
        weight_decay: lambda.

    Reference: Zhao et al., 2023, ICCV, "DOT: a distillation-oriented trainer", and the authors' code. From the code are
        plain momenta instead of Nesterov's, the weight decay in v only, and mu for weights that only one loss reaches.
    """

    def __init__(
        self, groups: Iterable[Mapping[str, Any]], lr: float, *, momentum: float, delta: float, weight_decay: float
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay}
        super().__init__([dict(group) for group in groups], defaults)
        self.noted: dict[Tensor, Tensor] = {}  # h, for the weights that it reaches

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, including the noted ones."""
        super().zero_grad(set_to_none)
        self.noted = {}

    def note(self, loss: Tensor) -> None:
        """Add the gradient of a loss of the teachers to h; its graph is kept.

        Args:
            loss: scalar; it must also be part of the loss whose gradient is in `.grad`.
        """
        weights = [weight for group in self.param_groups for weight in group["params"]]
        if not loss.requires_grad:
            return
        gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                self.noted[weight] = self.noted[weight] + gradient if weight in self.noted else gradient

    def average(self, world: World) -> None:
        """Average h over the ranks, as `DistributedDataParallel` averages gradients."""
        if world.size > 1 and self.noted:
            flat = world.sum(torch.cat([gradient.flatten() for gradient in self.noted.values()])) / world.size
            parts = flat.split([gradient.numel() for gradient in self.noted.values()])
            self.noted = {w: part.view_as(w) for w, part in zip(self.noted, parts, strict=True)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the weights by one step."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, self.noted.get(weight), group)

    def _move(self, weight: Tensor, distilled: Tensor | None, group: Mapping[str, Any]) -> None:
        state, momentum = self.state[weight], group["momentum"]
        if not state:
            state["momentum_buffer"], state["distillation_buffer"] = torch.zeros_like(weight), torch.zeros_like(weight)
        gradient = weight.grad if distilled is None else weight.grad - distilled  # type: ignore[operator]
        assert gradient is not None
        low = momentum if distilled is None else momentum - group["delta"]
        own, taught = state["momentum_buffer"], state["distillation_buffer"]
        own.mul_(low).add_(gradient).add_(weight, alpha=group["weight_decay"])
        weight.sub_(own, alpha=group["lr"])
        if distilled is not None:
            taught.mul_(momentum + group["delta"]).add_(distilled)
            weight.sub_(taught, alpha=group["lr"])
