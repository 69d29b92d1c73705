"""Similarity-preserving distillation: images of a batch should be equally similar for both networks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mgd.checks import check_maps
from mgd.losses.gather import gather
from mgd.losses.map_l2 import tapped
from mgd.losses.term import Term
from mgd.taps import Batch, Outputs


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1/B^2 * sum over pairs of images of (g_s - g_t)^2.

    g is Q Q^T with each row divided by its length; a row of Q is the flattened map of one image.

    Args:
        student: (B, S, H, W); the gradient flows here only.
        teacher: (B, T, H', W'), of any size.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the arguments are not maps, or their numbers of images differ.

    Reference: Tung, Mori, 2019, arXiv:1907.09682, equations 1 to 4.
    """
    check_maps("similarity", student, teacher)
    with torch.autocast(student.device.type, enabled=False):  # |Q|^2 may exceed the largest float16
        rows = [x.float().flatten(1) for x in (student, teacher.detach())]
        student_rows, teacher_rows = (F.normalize(x @ x.T, dim=1) for x in rows)
        return F.mse_loss(student_rows, teacher_rows)


class Similarity(Term):
    """`similarity` of the last tapped maps as a term, over the images of all ranks.

    Reference: Tung, Mori, 2019, arXiv:1907.09682.
    """

    needs = frozenset({"maps"})
    rectified = True
    relational = True
    paired = False
    weight = 3000.0

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        maps = tapped(student, -1), tapped(teacher, -1).detach()
        return similarity(*(gather(part, batch.counts) for part in maps))
