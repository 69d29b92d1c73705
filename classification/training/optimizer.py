"""What updates the weights: SGD with Nesterov momentum, Muon or DOT; and how its state is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from classification.errors import shown
from classification.options.groups import Optimisation
from classification.training.dot import DOT
from mgd import Distiller, has_bfloat16

# What each keeps of a weight.
STATE = {
    "sgd": {"momentum_buffer"},
    "dot": {"momentum_buffer", "distillation_buffer"},
    "muon": {"momentum_buffer", "use_muon", "step", "exp_avg", "exp_avg_sq"},
}


def build_optimizer(
    distiller: Distiller, options: Optimisation, *, bfloat16: bool | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer of all that a distiller trains.

    Muon moves the convolutions of the networks by their momentum, seen as a matrix (out, in * height * width) and made
    orthogonal; all else (depthwise convolutions, norms, heads, what the terms train) moves by Adam with Nesterov
    momentum, at the same rate.

    Args:
        distiller: what trains.
        options: of training.
        bfloat16: whether Muon computes in bfloat16; where the device has it by default.

    Reference: Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    weights = [p for p in distiller.parameters() if p.requires_grad]
    if options.optimizer == "sgd":
        nesterov = options.momentum > 0
        return torch.optim.SGD(
            weights, options.lr, momentum=options.momentum, weight_decay=options.weight_decay, nesterov=nesterov
        )
    if options.optimizer == "dot":
        own = {id(p) for p in distiller.terms.parameters()}  # which no label reaches
        groups: list[dict[str, Any]] = [
            {"params": [p for p in weights if id(p) not in own]},
            {"params": [p for p in weights if id(p) in own], "delta": 0.0},
        ]
        return DOT(
            [group for group in groups if group["params"]],
            options.lr,
            momentum=options.momentum,
            delta=options.dot_delta,
            weight_decay=options.weight_decay,
        )
    from classification.training.muon import Float32Muon, Muon  # of timm, which is slow to import

    hidden = {id(p) for network, _ in distiller.groups() for p in network.parameters() if p.ndim == 4}
    groups = [
        {"params": [p for p in weights if id(p) in hidden]},
        {"params": [p for p in weights if id(p) not in hidden], "use_fallback": True},
    ]
    kind = Muon if (has_bfloat16(weights[0].device) if bfloat16 is None else bfloat16) else Float32Muon
    return kind(groups, options.lr, weight_decay=options.weight_decay, momentum=options.momentum, nesterov=True)


def _name_of(optimizer: torch.optim.Optimizer) -> str:
    return {torch.optim.SGD: "sgd", DOT: "dot"}.get(type(optimizer), "muon")


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load the momenta of a saved state; rate, momentum and decay stay those of this run.

    Raises:
        ValueError: momenta of other weights, or none that are finite.
    """
    own = optimizer.state_dict()
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    kept = STATE[_name_of(optimizer)]
    for number, entry in saved["state"].items():
        if not 0 <= number < len(weights) or set(entry) - kept:
            raise ValueError(f"its optimizer has a state {shown(number)} of {shown(list(entry))}")
        for name, value in entry.items():
            if isinstance(value, Tensor):
                shape = () if name == "step" else weights[number].shape
                if value.shape != shape or not value.isfinite().all():
                    raise ValueError(f"the {name} of weight {number} does not fit, or is not finite")
            elif value is not None and not (name == "use_muon" and isinstance(value, bool)):
                raise ValueError(f"the {name} of weight {number} is {shown(value)}")
    optimizer.load_state_dict({**own, "state": saved["state"]})
