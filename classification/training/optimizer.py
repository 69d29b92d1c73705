"""Build optimizers (SGD with Nesterov momentum, AdamW, LAMB, Muon or DOT), and load their states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from classification.errors import quoted
from classification.options.groups import Optimisation
from classification.training.dot import DOT
from mgd import Distiller, has_bfloat16

# The entries of each optimizer's state per weight.
STATE = {
    "sgd": {"momentum_buffer"},
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "lamb": {"exp_avg", "exp_avg_sq"},
    "dot": {"momentum_buffer", "distillation_buffer"},
    "muon": {"momentum_buffer", "use_muon", "step", "exp_avg", "exp_avg_sq"},
}


def build_optimizer(
    distiller: Distiller, options: Optimisation, *, bfloat16: bool | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters that a distiller trains.

    Muon updates the convolutions of the networks by their momentum, reshaped to a matrix (out, in * height * width) and
    orthogonalised. All other parameters (of depthwise convolutions, norms, heads and terms) are updated by Adam with
    Nesterov momentum at the same learning rate. LAMB scales AdamW's step for each tensor to a share of the tensor's
    norm. With `no_decay` "norms", tensors with one axis (norms, biases) have no weight decay.

    Args:
        distiller: the networks and terms to train.
        options: of training.
        bfloat16: whether Muon computes in bfloat16; by default, if the device has it.

    Reference: Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks"; Loshchilov, Hutter, 2019,
        arXiv:1711.05101 (AdamW); You et al., 2020, arXiv:1904.00962 (LAMB).
    """
    weights = [p for p in distiller.parameters() if p.requires_grad]
    if options.optimizer == "sgd":
        nesterov = options.momentum > 0
        return torch.optim.SGD(
            _split([{"params": weights}], options),
            options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=nesterov,
        )
    if options.optimizer in ("adamw", "lamb"):
        betas = (options.momentum, 0.999)
        groups = _split([{"params": weights}], options)
        if options.optimizer == "adamw":
            return torch.optim.AdamW(groups, options.lr, betas=betas, weight_decay=options.weight_decay)
        from timm.optim import Lamb  # slow to import

        # LAMB's own clipping is off: --clip-gradients works for all optimizers.
        return Lamb(groups, options.lr, betas=betas, weight_decay=options.weight_decay, max_grad_norm=None)
    if options.optimizer == "dot":
        own = {id(p) for p in distiller.terms.parameters()}  # the gradient of the labels does not reach these
        groups = [
            {"params": [p for p in weights if id(p) not in own]},
            {"params": [p for p in weights if id(p) in own], "delta": 0.0},
        ]
        return DOT(
            _split([group for group in groups if group["params"]], options),
            options.lr,
            momentum=options.momentum,
            delta=options.dot_delta,
            weight_decay=options.weight_decay,
        )
    from classification.training.muon import Float32Muon, Muon  # slow to import

    hidden = {id(p) for network, _ in distiller.groups() for p in network.parameters() if p.ndim == 4}
    groups = [
        {"params": [p for p in weights if id(p) in hidden]},
        {"params": [p for p in weights if id(p) not in hidden], "use_fallback": True},
    ]
    kind = Muon if (has_bfloat16(weights[0].device) if bfloat16 is None else bfloat16) else Float32Muon
    return kind(
        _split(groups, options), options.lr, weight_decay=options.weight_decay, momentum=options.momentum, nesterov=True
    )


def _split(groups: Sequence[dict[str, Any]], options: Optimisation) -> list[dict[str, Any]]:
    """Split each group into weights with and without weight decay, as `no_decay` asks."""
    if options.no_decay == "none":
        return list(groups)
    split = []
    for group in groups:
        vectors = [weight for weight in group["params"] if weight.ndim <= 1]
        others = [weight for weight in group["params"] if weight.ndim > 1]
        split += [{**group, "params": others}, {**group, "params": vectors, "weight_decay": 0.0}]
    return [group for group in split if group["params"]]


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of an optimizer, as in the options."""
    return {"SGD": "sgd", "AdamW": "adamw", "Lamb": "lamb", "DOT": "dot"}.get(type(optimizer).__name__, "muon")


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load the momenta of a saved state; learning rate, momentum and weight decay stay those of this run.

    Raises:
        ValueError: the momenta are of other weights, or not finite.
    """
    own = optimizer.state_dict()
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    expected = STATE[kind_of(optimizer)]
    for number, entry in saved["state"].items():
        if not 0 <= number < len(weights) or set(entry) - expected:
            raise ValueError(f"its optimizer has a state {quoted(number)} of {quoted(list(entry))}")
        for name, value in entry.items():
            if isinstance(value, Tensor):
                shape = () if name == "step" else weights[number].shape
                if value.shape != shape or not value.isfinite().all():
                    raise ValueError(f"the {name} of weight {number} does not fit, or is not finite")
            elif value is not None and not (name == "use_muon" and isinstance(value, bool)):
                raise ValueError(f"the {name} of weight {number} is {quoted(value)}")
    for group, theirs in zip(own["param_groups"], saved["param_groups"], strict=True):
        if "step" in theirs:  # LAMB counts its steps here
            if not (isinstance(theirs["step"], Tensor) and theirs["step"].shape == () and theirs["step"].isfinite()):
                raise ValueError(f"its optimizer has done {quoted(theirs['step'])} steps")
            group["step"] = theirs["step"]
    optimizer.load_state_dict({**own, "state": saved["state"]})
