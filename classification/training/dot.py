"""DOT: SGD in which the gradients of the labels and of the teachers have momenta of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from classification.runs.world import World


class DOT(torch.optim.Optimizer):
    """SGD with a lower momentum for the gradient of the labels, and a higher one for that of the teachers.

    v <- (mu - delta) v + g + lambda w for the labels, u <- (mu + delta) u + h for the teachers, w <- w - eta (v + u)

    h is noted before a step: the gradient of the terms that read teachers. What is left of `.grad` is g. A weight that
    no such term reaches has the momentum mu.

    Args:
        groups: as in any optimizer; a group may have its own `delta`.
        lr: eta.
        momentum: mu.
        delta: half of the difference of the momenta.
        weight_decay: lambda.

    Reference: Zhao et al., 2023, ICCV, "DOT: a distillation-oriented trainer", and the authors' code, which has plain
        momenta instead of Nesterov's, the weight decay beside the labels, and mu for weights that one loss alone
        reaches.
    """

    def __init__(
        self, groups: Iterable[Mapping[str, Any]], lr: float, *, momentum: float, delta: float, weight_decay: float
    ) -> None:
        usual = {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay}
        super().__init__([dict(group) for group in groups], usual)
        self.noted: dict[Tensor, Tensor] = {}  # h, of the weights that it reaches

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those noted too."""
        super().zero_grad(set_to_none)
        self.noted = {}

    def note(self, loss: Tensor) -> None:
        """Add the gradient of a loss of the teachers to what is noted; its graph is kept.

        Args:
            loss: scalar; its part of `.grad` is the same.
        """
        weights = [weight for group in self.param_groups for weight in group["params"]]
        found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) if loss.requires_grad else ()
        for weight, gradient in zip(weights, found, strict=bool(found)):
            if gradient is not None:
                self.noted[weight] = self.noted[weight] + gradient if weight in self.noted else gradient

    def average(self, world: World) -> None:
        """Average what is noted over the ranks, as the gradients of `DistributedDataParallel` are."""
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
