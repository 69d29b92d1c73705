"""Overhauled feature distillation: trainable layers predict the teacher's maps from the student's, tap by tap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mgd.checks import check_maps
from mgd.flow import Flow
from mgd.losses.align import check_channels, pairs, regressor, start_from
from mgd.losses.flows import say_margins
from mgd.losses.margin import MeasuredMargin, partial_l2
from mgd.losses.starting import StartingTerm, StartOptions
from mgd.taps import Batch, Outputs, Probe


class _Stage(nn.Module):
    """One tap and one teacher: the regressor, and the margin, given or measured."""

    margin: Tensor | None

    def __init__(self, num_student: int, num_teacher: int, margin: Tensor | None) -> None:
        super().__init__()
        if margin is not None and margin.shape != (num_teacher,):
            raise ValueError(f"expected {num_teacher} margins, one per teacher channel; got {tuple(margin.shape)}")
        self.regressor = regressor(num_student, num_teacher)
        self.register_buffer("margin", None if margin is None else margin.detach().clone().float())
        self.measured = MeasuredMargin(num_teacher) if margin is None else None

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        margin, regressed = self.margin, self.regressor(student)
        check_maps("ofd", regressed, teacher, same="shape")
        if self.measured is not None:
            if self.training:
                self._measure(self.measured, teacher)
            margin = self.measured.mean()
        assert margin is not None
        return partial_l2(regressed, teacher, margin)

    def _measure(self, measured: MeasuredMargin, teacher: Tensor) -> None:
        # Only this batch is summed over the ranks, because earlier ones were summed already.
        batch = MeasuredMargin(teacher.shape[1]).to(teacher.device)
        batch.update(teacher)
        batch.all_reduce()
        measured.total += batch.total
        measured.count += batch.count


class OFD(StartingTerm):
    """Partial L2 of the teacher's maps and their predictions from the student's, both before the ReLU.

    loss = 1/B sum_i partial_l2(BN_i(W_i * student_i), teacher_i, margin_i) / 2^(n-1-i), i the tap out of n, W_i a 1x1
    convolution. If the resolutions differ, the larger map is average-pooled first.

    Args:
        student_channels: S of every tap.
        teacher_channels: T of every tap, one list per teacher.
        margins: one list per teacher of (T,) per tap, see `bn_margin`; or None for a tap (or all) whose margin is
            measured: the mean of the negative values of all maps in training, over all ranks, kept in buffers.
        hyper: the hyper-parameters, see `Term`.
        teacher_weights: see `Term`.
        values: the hyper-parameters by name.

    Raises:
        ValueError: lists have different lengths, or margins the wrong shape.
        RuntimeError: in the first forward, `init` is "flow", and neither `update` nor `start` was called.

    Reference: Heo et al., 2019, arXiv:1904.01866, section 3.
    """

    needs = frozenset({"maps"})
    weight = 1e-3

    @dataclass(frozen=True, kw_only=True)
    class Hyper(StartOptions):
        """Hyper-parameters of `OFD`, see `StartOptions`: `init` is for every W_i."""

    hyper: Hyper

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[Sequence[int]],
        hyper: Hyper | None = None,
        *,
        margins: Sequence[Sequence[Tensor | None]] | None = None,
        teacher_weights: Sequence[float] | None = None,
        **values: Any,
    ) -> None:
        check_channels(student_channels, teacher_channels)
        taps = range(len(student_channels))
        super().__init__(student_channels, teacher_channels, taps, hyper, teacher_weights=teacher_weights, **values)
        if margins is None:
            margins = [[None] * len(widths) for widths in teacher_channels]
        if [len(stages) for stages in margins] != [len(widths) for widths in teacher_channels]:
            raise ValueError(
                f"expected margins of {len(teacher_channels)} teachers, each a list of {len(student_channels)} taps; "
                f"got lists of {[len(stages) for stages in margins]}"
            )
        self.stages = nn.ModuleList(
            nn.ModuleList(_Stage(s, t, m) for s, t, m in zip(student_channels, widths, stages, strict=True))
            for widths, stages in zip(teacher_channels, margins, strict=True)
        )

    @classmethod
    def make(cls, student: Probe, teachers: Sequence[Probe], num_images: int, hyper: Hyper) -> OFD:
        margins = [list(teacher.margins) or [None] * len(teacher.channels) for teacher in teachers]
        term = cls(student.channels, [teacher.channels for teacher in teachers], hyper, margins=margins)
        term.notes = [say_margins(teacher) for teacher in teachers if teacher.paths]
        return term

    def begin(self, number: int, position: int, flow: Flow) -> None:
        start_from(self.get_submodule(f"stages.{number}.{position}.regressor"), flow)

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        stages = self.stages[number]
        assert isinstance(stages, nn.ModuleList)
        total = student.logits.new_zeros((), dtype=student.logits.float().dtype)
        for tap, (stage, maps) in enumerate(zip(stages, pairs(student, teacher), strict=True)):
            total = total + stage(*maps) / len(maps[0]) / 2 ** (len(stages) - 1 - tap)
        return total
