"""An average of the student over the steps of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def average(student: nn.Module, decay: float) -> AveragedModel:
    """Return the exponential moving average of a network's weights and statistics.

    average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) at update n, so that a short run is
    not slowed down by its first weights.

    Args:
        student: the network; `update_parameters(student)` after each step.
        decay: in (0, 1).
    """

    @torch.no_grad()
    def blend(averages: Any, weights: Any, updates: Any) -> None:
        step = 1 - min(decay, (1 + float(updates)) / (10 + float(updates)))
        if torch.is_floating_point(averages[0]):
            torch._foreach_lerp_(averages, weights, step)
        else:
            for kept, new in zip(averages, weights, strict=True):
                kept.copy_(new)

    return AveragedModel(student, multi_avg_fn=blend, use_buffers=True)


def state(average: AveragedModel | None, student: nn.Module) -> dict[str, Any]:
    """Return what a checkpoint keeps beside the average itself: the student, and the number of updates."""
    if average is None:
        return {}
    plain: dict[str, Tensor] = student.state_dict()
    return {"student": plain, "updates": int(average.n_averaged)}


def restore(average: AveragedModel | None, student: nn.Module, kept: dict[str, Any]) -> None:
    """Restore student and average. The checkpoint's main weights are the average, the student's own are in `kept`."""
    if average is not None:
        average.module.load_state_dict(student.state_dict())
        average.n_averaged.fill_(int(kept.get("updates", 0)))
    if kept:
        student.load_state_dict(kept["student"])
