"""Mean squared distance of one map; the map part of mutual learning with maps (U-DML)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mgd.checks import check_maps
from mgd.losses.align import same_size
from mgd.losses.term import HyperParameters, Term, per_teacher
from mgd.taps import Batch, Outputs, Probe, as_map


def tapped(outputs: Outputs, tap: int) -> Tensor:
    """Return the map of one tap as (B, C, H, W) float32.

    Args:
        outputs: of one network.
        tap: position in its list of taps; negative ones count from the last.

    Raises:
        ValueError: there is no such tap.
    """
    count = len(outputs.features)
    if not -count <= tap < count:
        raise ValueError(f"tap {tap} was asked for, and the network has {count} taps: choose one from {-count} on")
    return as_map(outputs.features[tap]).float()


def width_adapter(num_student: int, num_teacher: int) -> nn.Module:
    """Return a 1x1 convolution from `num_student` to `num_teacher` channels; the identity if they are equal."""
    return nn.Identity() if num_student == num_teacher else nn.Conv2d(num_student, num_teacher, 1)


def map_l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean over all elements of (student - teacher)^2.

    Args:
        student: (B, C, H, W); the gradient flows here only.
        teacher: (B, C, H', W'); the larger map is average-pooled to the size of the smaller.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the arguments are not maps, or their numbers of images or channels differ.

    Reference: Du et al., 2021, arXiv:2109.03144, section 2.2: the loss on maps of U-DML.
    """
    check_maps("map_l2", student, teacher, same="channels")
    student, teacher = same_size(student.float(), teacher.detach().float())
    return F.mse_loss(student, teacher)


class MapL2(Term):
    """`map_l2` of one tap; its sum with `dml` is `udml`.

    The student's map passes a learned 1x1 convolution if its width differs from the teacher's.

    Args:
        student_channels: width of the student's map.
        teacher_channels: width of the map of every teacher.
        hyper: the hyper-parameters, see `Term`.
        teacher_weights: see `Term`.
        values: the hyper-parameters by name.
    """

    needs = frozenset({"maps"})

    @dataclass(frozen=True, kw_only=True)
    class Hyper(HyperParameters):
        """Hyper-parameters of `MapL2`.

        Args:
            tap: which tap, of the student and of every teacher; -1 is the last.
        """

        tap: int = -1

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
        super().__init__(hyper, teacher_weights=per_teacher(teacher_weights, teacher_channels), **values)
        self.adapters = nn.ModuleList(width_adapter(student_channels, channels) for channels in teacher_channels)

    @classmethod
    def make(cls, student: Probe, teachers: Sequence[Probe], num_images: int, hyper: Any) -> MapL2:
        widths = [tapped(network.outputs, hyper.tap).shape[1] for network in (student, *teachers)]
        return cls(widths[0], widths[1:], hyper)

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        # Pooling commutes with a 1x1 convolution, and is done first to make it cheaper.
        student_map, teacher_map = same_size(tapped(student, self.hyper.tap), tapped(teacher, self.hyper.tap))
        return map_l2(self.adapters[number](student_map), teacher_map)
