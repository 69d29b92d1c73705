"""Matching guided distillation as one would first write it: what the benchmarks compare with.

Eager, float32, channels first, the teacher's graph kept, every reducer by stack and gather. With `prefixes`, each map
of a MobileNet-V2 is computed by a forward of its own from the images on, as the published code does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgd import Taps


class PlainDistiller(nn.Module):
    """Cross-entropy, AMP matching in the published sum form, and KD.

    Args:
        student: tapped.
        teacher: tapped; not frozen, and its graph is kept.
        margins: (T,) of every stage.
        flows: (G, S) of every stage, none empty.
        prefixes: modules of the student whose last outputs are its maps, computed from the images on, one by one.
        temperature: of KD.
    """

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        margins: Sequence[Tensor],
        flows: Sequence[Tensor],
        prefixes: Sequence[nn.Module] = (),
        temperature: float = 1.5,
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.prefixes, self.temperature = student, teacher.eval(), prefixes, temperature
        self.margins, self.flows = margins, flows
        self.adapters = nn.ModuleList(nn.BatchNorm2d(flow.shape[1]) for flow in flows)

    def train(self, mode: bool = True) -> PlainDistiller:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return {"loss", "ce", "mgd", "kd"} of (B, 3, H, W) and (B,)."""
        teacher = self.teacher(images)
        if self.prefixes:
            logits, maps = self.student.model(images), [prefix(images) for prefix in self.prefixes]
        else:
            outputs = self.student(images)
            logits, maps = outputs.logits, outputs.features
        ce = F.cross_entropy(logits, target)
        kd = self._kd(logits, teacher.logits.detach())
        mgd = self._mgd(maps[-len(self.flows) :], [m.detach() for m in teacher.features]) / len(images)
        return {"loss": ce + mgd / 1e4 + kd, "ce": ce, "mgd": mgd, "kd": kd}

    def _kd(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        tau = self.temperature
        student, teacher = F.log_softmax(logits / tau, dim=1), F.softmax(teacher_logits / tau, dim=1)
        return tau**2 * F.kl_div(student, teacher, reduction="batchmean")

    def _mgd(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        total = student_maps[0].new_zeros(())
        for i, (student, teacher) in enumerate(zip(student_maps, teacher_maps, strict=True)):
            flow, adapted = self.flows[i], self.adapters[i](student)
            members = torch.stack([teacher[:, row] for row in flow])  # (G, B, S, H, W)
            largest = members.abs().argmax(dim=0, keepdim=True)
            goal = members.gather(0, largest)[0]
            margin = torch.stack([self.margins[i][row] for row in flow]).mean(0)[None, :, None, None]
            goal = torch.max(goal, margin)
            error = F.mse_loss(adapted, goal, reduction="none")
            error = error * ((adapted > goal) | (goal > 0)).float()
            total = total + error.sum() / 2 ** (len(self.flows) - 1 - i)
        return total


class Prefix(nn.Module):
    """The front of a MobileNet-V2, up to the norm of a block's depthwise convolution.

    Args:
        network: the MobileNet-V2; its modules are shared, not copied.
        block: number of the block in `network.features`.
    """

    def __init__(self, network: nn.Module, block: int) -> None:
        super().__init__()
        features = list(network.features)  # type: ignore[arg-type]
        convs = list(features[block].conv)  # expansion, depthwise, projection, norm
        depthwise = list(convs[1])
        self.front = nn.Sequential(*features[:block], convs[0], *depthwise[:2])  # the last of it activates

    def forward(self, images: Tensor) -> Tensor:
        """Return the map (B, S, H, W) before the activation."""
        maps: Tensor = self.front(images)
        return maps
