"""WKD of maps: Gaussian Wasserstein distance of each map's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgd.checks import check_counts, check_maps, check_positive
from mgd.losses.align import regressor, same_size
from mgd.losses.map_l2 import tapped
from mgd.losses.term import HyperParameters, Term, per_teacher
from mgd.taps import Batch, Outputs, Probe

EPS = 1e-5  # added to a variance


def wkd_maps(student: Tensor, teacher: Tensor, *, mean_weight: float = 2.0, grid: int = 1) -> Tensor:
    """Compute 1/B * sum over images of mean_weight * |mu_s - mu_t|^2 + |sigma_s - sigma_t|^2.

    mu and sigma are the mean and the standard deviation (of n - 1, with 1e-5 added to the variance) of each channel
    over the pixels. For mean_weight 1 it is the squared Wasserstein distance of Gaussians without covariances.

    Args:
        student: (B, C, H, W); the gradient flows here only.
        teacher: (B, C, H', W'); the larger map is average-pooled to the size of the smaller.
        mean_weight: weight of the means, > 0.
        grid: the map is cut into grid x grid parts as in adaptive pooling; the result is the mean over the parts.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the arguments are not maps, or their numbers of images or channels differ; or a hyper-parameter is
            outside its range.

    Reference: Lv, Yang, Li, 2024, arXiv:2412.08139. Variance and grid are as in the authors' code. A part of one pixel
        has variance 0 here; there it is undefined.
    """
    check_maps("wkd_maps", student, teacher, same="channels")
    check_positive("wkd_maps", mean_weight=mean_weight)
    check_counts("wkd_maps", grid=grid)
    student, teacher = same_size(student.float(), teacher.detach().float())
    total = student.new_zeros(())
    for part_s, part_t in zip(_parts(student, grid), _parts(teacher, grid), strict=True):
        means = F.mse_loss(part_s.mean(dim=2), part_t.mean(dim=2), reduction="sum")
        spreads = F.mse_loss(_deviation(part_s), _deviation(part_t), reduction="sum")
        total = total + mean_weight * means + spreads
    return total / (grid**2 * len(student))


def _parts(maps: Tensor, grid: int) -> list[Tensor]:
    """Cut (B, C, H, W) into (B, C, pixels) parts, row by row; they overlap if the grid does not divide the size."""

    def borders(size: int) -> list[slice]:
        return [slice(i * size // grid, -(-(i + 1) * size // grid)) for i in range(grid)]

    return [
        maps[:, :, rows, columns].flatten(2) for rows in borders(maps.shape[2]) for columns in borders(maps.shape[3])
    ]


def _deviation(part: Tensor) -> Tensor:
    """(B, C, pixels) -> (B, C)."""
    variance = part.var(dim=2, unbiased=True) if part.shape[2] > 1 else torch.zeros_like(part[:, :, 0])
    return (variance + EPS).sqrt()


class WKDMaps(Term):
    """`wkd_maps` of one tap; the student's map first passes a 1x1 convolution, its normalisation and a ReLU.

    On CIFAR-100, the source lowers the weight by a cosine after the learning rate first drops; this term does not.

    Args:
        student_channels: width of the student's map.
        teacher_channels: width of the map of every teacher.
        hyper: the hyper-parameters, see `Term`.
        teacher_weights: see `Term`.
        values: the hyper-parameters by name.
    """

    needs = frozenset({"maps"})
    rectified = True
    weight = 0.02

    @dataclass(frozen=True, kw_only=True)
    class Hyper(HyperParameters):
        """Hyper-parameters of `WKDMaps`.

        Args:
            tap: which tap, of the student and of every teacher; -1 is the last.
            mean_weight: weight of the means beside the standard deviations, > 0.
            grid: number of parts along each side of the map.
        """

        tap: int = -1
        mean_weight: float = 2.0
        grid: int = 1

        def __post_init__(self) -> None:
            super().__post_init__()
            check_positive("wkd_maps", mean_weight=self.mean_weight)
            check_counts("wkd_maps", grid=self.grid)

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
        self.regressors = nn.ModuleList(regressor(student_channels, channels) for channels in teacher_channels)

    @classmethod
    def make(cls, student: Probe, teachers: Sequence[Probe], num_images: int, hyper: Any) -> WKDMaps:
        widths = [tapped(network.outputs, hyper.tap).shape[1] for network in (student, *teachers)]
        return cls(widths[0], widths[1:], hyper)

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        maps = same_size(tapped(student, self.hyper.tap), tapped(teacher, self.hyper.tap))
        regressed = F.relu(self.regressors[number](maps[0]))
        return wkd_maps(regressed, maps[1], mean_weight=self.hyper.mean_weight, grid=self.hyper.grid)
