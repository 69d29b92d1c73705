"""Masked generative distillation: restore the teacher's map from the student's partly hidden map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mgd.checks import check_maps
from mgd.flow import Flow
from mgd.losses.align import same_size, start_from
from mgd.losses.map_l2 import map_l2, tapped, width_adapter
from mgd.losses.starting import StartingTerm, StartOptions
from mgd.taps import Batch, Outputs, Probe

MASKS = ("channels", "pixels")


class _Restorer(nn.Module):
    """The layers between the student's map and one teacher's."""

    def __init__(self, num_student: int, num_teacher: int, *, always: bool) -> None:
        super().__init__()
        self.align = nn.Conv2d(num_student, num_teacher, 1) if always else width_adapter(num_student, num_teacher)
        self.generator = nn.Sequential(
            nn.Conv2d(num_teacher, num_teacher, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(num_teacher, num_teacher, 3, padding=1),
        )


def _check_mask(ratio: float, mask: str) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is the share of entries that are masked, in [0, 1); got {ratio}")
    if mask not in MASKS:
        raise ValueError(f"unknown mask {mask!r}; choose from {', '.join(MASKS)}")


def draw_mask(maps: Tensor, ratio: float, what: str = "channels", generator: torch.Generator | None = None) -> Tensor:
    """Draw a mask of ones, each entry being 0 with probability `ratio`.

    Args:
        maps: (B, C, H, W), to be masked.
        ratio: in [0, 1).
        what: "channels": one entry per image and channel; "pixels": one per image and pixel.
        generator: source of the draws, on the device of `maps`; None for the device's default one.

    Returns:
        (B, C, 1, 1) or (B, 1, H, W), in the type of `maps`.

    Raises:
        ValueError: `maps` are not maps, the ratio is outside [0, 1), or `what` is unknown.
    """
    check_maps("draw_mask", maps, maps)
    _check_mask(ratio, what)
    batch, channels, height, width = maps.shape
    shape = (batch, channels, 1, 1) if what == "channels" else (batch, 1, height, width)
    return (torch.rand(shape, device=maps.device, generator=generator) >= ratio).to(maps.dtype)


class MaskedGenerative(StartingTerm):
    """Compute mean over all elements of (teacher - generator(mask * align(student)))^2 at one tap.

    align is a 1x1 convolution if the widths differ or it starts from a flow, else the identity; before that, the larger
    map is average-pooled to the size of the smaller. generator = 3x3 convolution, ReLU, 3x3 convolution at the
    teacher's width. Masked entries are 0 and the others are not rescaled. In eval mode nothing is masked, so the
    value is not random.

    `generator` is a `torch.Generator` to draw masks from; None for the default one of the device. One published recipe
    multiplies the weight by 1.756; here the caller sets the weight.

    Args:
        student_channels: width of the student's map.
        teacher_channels: width of the map of every teacher.
        hyper: the hyper-parameters, see `Term`.
        teacher_weights: see `Term`.
        values: the hyper-parameters by name.

    Reference: Yang et al., 2022, arXiv:2205.01529, section 3.
    """

    needs = frozenset({"maps"})
    rectified = True

    @dataclass(frozen=True, kw_only=True)
    class Hyper(StartOptions):
        """Hyper-parameters of `MaskedGenerative`, and those of `StartOptions`, whose `init` is for align.

        Args:
            ratio: probability that an entry is masked, in [0, 1).
            mask: what is masked: "channels" or "pixels" of each image.
            tap: which tap, of the student and of every teacher; -1 is the last.
        """

        ratio: float = 0.15
        mask: Literal["channels", "pixels"] = "channels"
        tap: int = -1

        def __post_init__(self) -> None:
            super().__post_init__()
            _check_mask(self.ratio, self.mask)

    hyper: Hyper

    def __init__(
        self,
        student_channels: int,
        teacher_channels: Sequence[int],
        hyper: Hyper | None = None,
        *,
        teacher_weights: Sequence[float] | None = None,
        **values: Any,
    ) -> None:
        hyper = self._hyper(hyper, **values)
        widths = [student_channels], [[channels] for channels in teacher_channels]
        super().__init__(*widths, [hyper.tap], hyper, teacher_weights=teacher_weights)
        self.generator: torch.Generator | None = None
        always = hyper.init == "flow"
        self.restorers = nn.ModuleList(
            _Restorer(student_channels, channels, always=always) for channels in teacher_channels
        )

    @classmethod
    def make(cls, student: Probe, teachers: Sequence[Probe], num_images: int, hyper: Any) -> MaskedGenerative:
        widths = [tapped(network.outputs, hyper.tap).shape[1] for network in (student, *teachers)]
        return cls(widths[0], widths[1:], hyper)

    def begin(self, number: int, position: int, flow: Flow) -> None:
        start_from(self.get_submodule(f"restorers.{number}.align"), flow)

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        restorer = self.restorers[number]
        assert isinstance(restorer, _Restorer)
        student_map, teacher_map = same_size(tapped(student, self.hyper.tap), tapped(teacher, self.hyper.tap))
        aligned = restorer.align(student_map)
        if self.training:
            aligned = aligned * draw_mask(aligned, self.hyper.ratio, self.hyper.mask, self.generator)
        return map_l2(restorer.generator(aligned), teacher_map)
