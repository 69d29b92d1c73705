"""Frozen teachers: eval mode that stays, no autograd graph, several as one."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mgd.taps import Outputs, Taps


class Frozen(nn.Module):
    """A network that never trains: eval mode survives `.train()`, no gradient, no graph; it returns `Outputs`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.taps = model if isinstance(model, (Taps, Ensemble)) else Taps(model)
        self._copies: dict[torch.device, nn.Module] = {}
        self.requires_grad_(False)
        self.taps.eval()

    def train(self, mode: bool = True) -> Frozen:
        """Stay in eval mode."""
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Outputs:
        """Return the `Outputs` for `images` (B, 3, H, W), none of which requires a gradient."""
        outputs: Outputs = self._on(images.device)(images)
        return outputs

    def _on(self, device: torch.device) -> nn.Module:
        """Return the network on `device`, copied there once: DataParallel calls one teacher from many devices."""
        weight = next(self.taps.parameters(), None)
        if weight is None or weight.device == device:
            return self.taps
        if device not in self._copies:
            if not isinstance(self.taps, Taps):
                raise ValueError(f"the teacher is on {weight.device}, the images on {device}: move one of them")
            model = copy.deepcopy(self.taps.model).to(device)
            self._copies[device] = Taps(model, self.taps.paths).eval()
        return self._copies[device]


def freeze(model: nn.Module) -> Frozen:
    """Freeze a network, tapped (`Taps`) or not, as a teacher; freezing twice changes nothing."""
    return model if isinstance(model, Frozen) else Frozen(model)


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
        if not models or len(weights) != len(models) or min(weights) <= 0:
            raise ValueError(f"expected one positive weight per network; got {weights} for {len(models)} networks")
        self.models = nn.ModuleList(m if isinstance(m, (Taps, Frozen)) else Taps(m) for m in models)
        self.register_buffer("weights", torch.tensor(weights) / sum(weights))

    def forward(self, images: Tensor) -> Outputs:
        """Return the joint `Outputs` for `images` (B, 3, H, W)."""
        outputs: list[Outputs] = [model(images) for model in self.models]
        log_p = torch.stack([o.logits.float().log_softmax(1) for o in outputs])  # (N, B, K)
        logits = torch.logsumexp(log_p + self.weights.log()[:, None, None], dim=0)
        return Outputs(logits, [feature for o in outputs for feature in o.features])
