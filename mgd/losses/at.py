"""Attention transfer: both networks should respond at the same places of the image."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mgd.checks import check_maps
from mgd.losses.align import pairs, same_size
from mgd.losses.term import Term
from mgd.taps import Batch, Outputs


def energy(x: Tensor) -> Tensor:
    """Compute the mean over the channels of x^2, (B, C, H, W) -> (B, 1, H, W) in float32."""
    return x.float().square().mean(dim=1, keepdim=True)


def at(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1 / (B H W) * sum over images of |Q_s / |Q_s| - Q_t / |Q_t||^2, Q the `energy` flattened over H W.

    If the resolutions differ, the larger map is average-pooled before it is squared.

    Args:
        student: (B, S, H, W); the gradient flows here only.
        teacher: (B, T, H', W').

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the arguments are not maps, or their numbers of images differ.

    Reference: Zagoruyko, Komodakis, 2017, arXiv:1612.03928, section 3.1, equation 2.
    """
    check_maps("at", student, teacher)
    student, teacher = same_size(student.float(), teacher.detach().float())
    student_unit = F.normalize(energy(student).flatten(1), dim=1)
    teacher_unit = F.normalize(energy(teacher).flatten(1), dim=1)
    return (student_unit - teacher_unit).square().mean()


class AT(Term):
    """`at`, summed over the taps.

    The published weight 1000 belongs to this scale: a mean over images and pixels, a sum over taps.
    """

    needs = frozenset({"maps"})
    rectified = True
    weight = 1000.0

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        total = student.logits.new_zeros((), dtype=student.logits.float().dtype)
        for student_map, teacher_map in pairs(student, teacher):
            total = total + at(student_map, teacher_map)
        return total
