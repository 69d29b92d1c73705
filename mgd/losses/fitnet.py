"""FitNets: the student predicts a map from the middle of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mgd.flow import Flow
from mgd.losses.align import check_channels, pair, regressor, start_from
from mgd.losses.map_l2 import map_l2
from mgd.losses.starting import StartingTerm, StartOptions
from mgd.taps import Batch, Outputs, Probe


class FitNet(StartingTerm):
    """Mean squared error of the teacher's map (the hint) and its prediction from the student's map at the same tap.

    loss = mean over images, channels and pixels of (BN(W * student) - teacher)^2, W a 1x1 convolution.
    If the resolutions differ, the larger map is average-pooled first.

    Args:
        student_channels: S of every tap.
        teacher_channels: T of every tap, one list per teacher.
        hyper: the hyper-parameters, see `Term`.
        teacher_weights: see `Term`.
        values: the hyper-parameters by name.

    Raises:
        ValueError: lists have different lengths, or there is no such tap.

    Reference: Romero et al., 2015, arXiv:1412.6550, section 2.2, equation 3.
    """

    needs = frozenset({"maps"})
    rectified = True
    weight = 100.0

    @dataclass(frozen=True, kw_only=True)
    class Hyper(StartOptions):
        """Hyper-parameters of `FitNet`, and those of `StartOptions`, whose `init` is for W.

        Args:
            tap: number of the tap that is compared, from 0, or from the end if negative; None for the middle one,
                n // 2 of n (of four stages the third, which has the middle layer of the usual residual networks).
        """

        tap: int | None = None

    hyper: Hyper

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[Sequence[int]],
        hyper: Hyper | None = None,
        *,
        teacher_weights: Sequence[float] | None = None,
        **values: Any,
    ) -> None:
        check_channels(student_channels, teacher_channels)
        hyper = self._hyper(hyper, **values)
        num_taps, tap = len(student_channels), hyper.tap
        chosen = num_taps // 2 if tap is None else tap
        if not -num_taps <= chosen < num_taps:
            raise ValueError(f"expected tap in [{-num_taps}, {num_taps}), as there are {num_taps} taps; got {tap}")
        widths = [student_channels[chosen]], [[each[chosen]] for each in teacher_channels]
        super().__init__(*widths, [chosen], hyper, teacher_weights=teacher_weights)
        self.tap = chosen
        self.regressors = nn.ModuleList(
            regressor(student_channels[self.tap], widths[self.tap]) for widths in teacher_channels
        )

    @classmethod
    def make(cls, student: Probe, teachers: Sequence[Probe], num_images: int, hyper: Any) -> FitNet:
        return cls(student.channels, [teacher.channels for teacher in teachers], hyper)

    def begin(self, number: int, position: int, flow: Flow) -> None:
        start_from(self.regressors[number], flow)

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        student_map, hint = pair(student.features[self.tap], teacher.features[self.tap])
        return map_l2(self.regressors[number](student_map), hint)
