"""FitNets: the student regresses a map from the middle of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from mgd.losses.align import channels, check_channels, pair, regressor
from mgd.losses.map_l2 import map_l2
from mgd.losses.term import Term
from mgd.taps import Batch, Outputs


class FitNet(Term):
    """Mean squared error of the teacher's map (the hint) and one regressed from the student's map at the same tap.

    loss = mean over images, channels and pixels of (BN(W * student) - teacher)^2, W a 1x1 convolution.
    Where the resolutions differ, the larger map is average-pooled first.

    Args:
        student_channels: S of every tap.
        teacher_channels: T of every tap, one list a teacher.
        tap: which one holds the hint, negative ones counted from the end; None for the middle one, number n // 2 of n
            (of four stages the third, which holds the middle layer of the usual residual nets).
        teacher_weights: see `Term`.

    Raises:
        ValueError: lists of different length, or no such tap.

    Reference: Romero et al., 2015, arXiv:1412.6550, section 2.2, equation 3.
    """

    needs = frozenset({"maps"})
    rectified = True
    weight: ClassVar[float] = 100.0

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[Sequence[int]],
        *,
        tap: int | None = None,
        teacher_weights: Sequence[float] | None = None,
    ) -> None:
        check_channels(student_channels, teacher_channels)
        super().__init__([1.0] * len(teacher_channels) if teacher_weights is None else teacher_weights)
        num_taps = len(student_channels)
        self.tap = num_taps // 2 if tap is None else tap
        if not -num_taps <= self.tap < num_taps:
            raise ValueError(f"expected tap in [{-num_taps}, {num_taps}), as there are {num_taps} taps; got {tap}")
        self.regressors = nn.ModuleList(
            regressor(student_channels[self.tap], widths[self.tap]) for widths in teacher_channels
        )

    @classmethod
    def from_outputs(cls, student: Outputs, teachers: Sequence[Outputs], num_images: int, **options: Any) -> FitNet:
        return cls(channels(student), [channels(teacher) for teacher in teachers], **options)

    def compare(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        student_map, hint = pair(student.features[self.tap], teacher.features[self.tap])
        return map_l2(self.regressors[number](student_map), hint)
