"""An average of the student over the steps of training."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def average(student: nn.Module, decay: float) -> AveragedModel:
    """Return the exponential moving average of a network's weights and statistics.

    average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) at update n, so that a short run is
    not slowed down by its first weights.

    Args:
        student: the network; call `update_parameters(student)` after each step.
        decay: in (0, 1).
    """
    return _Average(student, decay)


class _Average(AveragedModel):
    """torch's average, whose number of updates stays on the processor: reading it would wait for a GPU."""

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__(student, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        updates = int(self.n_averaged)
        step = 1.0 if updates == 0 else 1 - min(self.decay, (1 + updates) / (10 + updates))
        own, new = (list(chain(m.parameters(), m.buffers())) for m in (self.module, model))
        floating = [n for n, value in enumerate(own) if torch.is_floating_point(value)]
        torch._foreach_lerp_([own[n] for n in floating], [new[n].detach() for n in floating], step)
        for n in set(range(len(own))) - set(floating):
            own[n].copy_(new[n])
        self.n_averaged += 1


def state(average: AveragedModel | None, student: nn.Module) -> dict[str, Any]:
    """Return what a checkpoint has in addition to the average: the student's own weights and the number of updates."""
    if average is None:
        return {}
    plain: dict[str, Tensor] = student.state_dict()
    return {"student": plain, "updates": int(average.n_averaged)}


def restore(average: AveragedModel | None, student: nn.Module, kept: dict[str, Any]) -> None:
    """Restore average and student. `student` has the average loaded, if there is one; its own weights are in `kept`."""
    if average is not None:
        average.module.load_state_dict(student.state_dict())
        average.n_averaged.fill_(int(kept.get("updates", 0)))
    if kept:
        student.load_state_dict(kept["student"])
