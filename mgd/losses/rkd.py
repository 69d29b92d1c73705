"""Relational distillation: the distances and angles between the images of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mgd.checks import check_at_least_0, check_tensors
from mgd.losses.gather import gather
from mgd.losses.term import HyperParameters, Term
from mgd.taps import Batch, Outputs, as_map


def _distances(x: Tensor) -> Tensor:
    """Return (B, B) distances divided by their mean over distinct images; zeros if all images are equal."""
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / max(len(x) * (len(x) - 1), 1)
    scaled: Tensor = distances / mean.masked_fill(mean == 0, math.inf)
    return scaled


def _angles(x: Tensor) -> Tensor:
    """Return (B, B, B) cosines: [j, i, k] of the angle at image j between images i and k; 0 where it is undefined."""
    edges = x[None] - x[:, None]  # (B, B, D): [j, i] from j to i
    lengths = edges.norm(dim=2, keepdim=True)
    # Dividing an edge of length 0 by infinity gives value 0 and, unlike a small constant, gradient 0.
    units: Tensor = edges / lengths.masked_fill(lengths == 0, math.inf)
    return units @ units.transpose(1, 2)


def rkd(student: Tensor, teacher: Tensor, *, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Compute w_d * mean_ij h(d_ij^s - d_ij^t) + w_a * mean_ijk h(c_ijk^s - c_ijk^t), h the smooth-L1 function.

    d_ij = |x_i - x_j| over its mean of i != j; c_ijk = cos of the angle at x_j between x_i and x_k;
    h(e) = e^2 / 2 for |e| < 1, else |e| - 1/2. The means run over all B^2 pairs and B^3 triples, as the published
    weights assume; those with equal images count as 0. Memory grows with B^2 max(B, D).

    Args:
        student: (B, D) embeddings; the gradient flows here only.
        teacher: (B, D') embeddings.
        distance: w_d.
        angle: w_a.

    Returns:
        Scalar, float32; 0 for a single image.

    Raises:
        ValueError: the arguments are not embeddings of the same images, or a weight is negative.

    Reference: Park et al., 2019, arXiv:1904.05068, sections 3.2.1 and 3.2.2.
    """
    check_tensors("rkd", student=student, teacher=teacher)
    check_at_least_0("rkd", distance=distance, angle=angle)
    if not student.ndim == teacher.ndim == 2 or len(student) != len(teacher) or 0 in (*student.shape, *teacher.shape):
        raise ValueError(
            "rkd compares embeddings (B, D) and (B, D') of the same images; "
            f"got {tuple(student.shape)} of the student, {tuple(teacher.shape)} of the teacher"
        )
    student, teacher = student.float(), teacher.detach().float()
    total = student.new_zeros(())
    with torch.autocast(student.device.type, enabled=False):
        for weight, relation in ((distance, _distances), (angle, _angles)):
            if weight > 0:
                total = total + weight * F.smooth_l1_loss(relation(student), relation(teacher))
    return total


class RKD(Term):
    """`rkd` over the images of all ranks.

    The embedding is the last tapped map, averaged over its pixels, or the logits if either network has no taps.
    """

    uses = frozenset({"maps"})
    rectified = True
    relational = True
    paired = False

    @dataclass(frozen=True, kw_only=True)
    class Hyper(HyperParameters):
        """Hyper-parameters of `RKD`.

        Args:
            distance: weight of the distances, at least 0.
            angle: weight of the angles, at least 0.

        Raises:
            ValueError: a weight is negative, or both are 0.
        """

        distance: float = 25.0
        angle: float = 50.0

        def __post_init__(self) -> None:
            super().__post_init__()
            distance, angle = self.distance, self.angle
            if not (0 <= distance < math.inf and 0 <= angle < math.inf) or distance == angle == 0:
                raise ValueError(
                    f"distance and angle must be at least 0, and one of them positive; got {distance} and {angle}"
                )

    hyper: Hyper

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        embeddings = (student.logits, teacher.logits.detach())
        if student.features and teacher.features:
            maps = (as_map(student.features[-1]).float(), as_map(teacher.features[-1].detach()).float())
            embeddings = (maps[0].mean(dim=(2, 3)), maps[1].mean(dim=(2, 3)))
        gathered = (gather(embeddings[0], batch.counts), gather(embeddings[1], batch.counts))
        return rkd(*gathered, distance=self.hyper.distance, angle=self.hyper.angle)
