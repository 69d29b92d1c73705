"""Margins of teacher channels, and the margin-ReLU partial L2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgd.checks import check_maps, check_margin


class MeasuredMargin(nn.Module):
    """Mean of the negative values of each channel over the images of a matching pass; 0 if there are none.

    Args:
        num_teacher: T, teacher channels.
    """

    total: Tensor
    count: Tensor

    def __init__(self, num_teacher: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(num_teacher, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(num_teacher, dtype=torch.float64))

    @torch.no_grad()
    def update(self, teacher: Tensor) -> None:
        """Add a batch (B, T, H, W); raise ValueError for another number of channels."""
        check_maps("MeasuredMargin.update", teacher, teacher)
        check_margin("MeasuredMargin.update", self.total, teacher, per_pixel=False)
        self.total += teacher.clamp_max(0).sum(dim=(0, 2, 3), dtype=torch.float64)
        self.count += (teacher < 0).sum(dim=(0, 2, 3))

    def mean(self) -> Tensor:
        """Return the (T,) float32 margins."""
        return (self.total / self.count.clamp_min(1)).float()

    def reset(self) -> None:
        """Forget every image."""
        self.total.zero_()
        self.count.zero_()

    def all_reduce(self) -> None:
        """Sum over the ranks of the process group, if there is one."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.total)
            dist.all_reduce(self.count)


def partial_l2(student: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """Sum the squared error where the teacher is positive or the student is above the teacher.

    target' = max(target, margin); loss = sum of (student - target')^2 over {student > target' or target' > 0}.
    Below a negative target there is no error, because the ReLU hides the difference.

    Args:
        student: (B, S, H, W) maps before the ReLU; the gradient flows here only.
        target: (B, S, H, W) reduced teacher maps.
        margin: (S,), or (B, S, H, W) if it differs by pixel.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the maps have different shapes, or the margin does not fit.

    Reference: Heo et al., 2019, arXiv:1904.01866, equations 2 and 4.
    """
    check_maps("partial_l2", student, target, same="shape")
    return sum_partial_l2(student, target, lambda part: (part, margin))[0]


def sum_partial_l2(
    student: Tensor,
    teacher: Tensor,
    reduce: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    slice_size: int | None = None,
    with_energy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `partial_l2` of a batch in slices, whose targets are computed one after another.

    Args:
        student: (B, S, H, W); the gradient of the error flows here only.
        teacher: (B, T, H, W).
        reduce: returns the target (b, S, H, W) and the margin for a slice (b, T, H, W) of the teacher's maps.
        slice_size: number of elements of the student's maps in a slice (at least one image); None for the whole batch.
        with_energy: whether to sum the energy.

    Returns:
        The error, and the energy |max(target, 0)|^2 or 0 without `with_energy`: scalars, float32.

    Raises:
        ValueError: the numbers of images differ, or target or margin have another shape.
    """
    if len(teacher) != len(student):
        raise ValueError(f"partial_l2 needs a target for each of {len(student)} images; got {len(teacher)}")
    if torch.compiler.is_compiling():  # the compiler fuses everything and derives the gradient
        target, margin = (part.detach() for part in reduce(teacher))
        error = _counted(student, target, margin).square().sum()
        return error, _energy(target) if with_energy else torch.zeros((), device=student.device)
    num_images = max(1, slice_size // student.shape[1:].numel()) if slice_size else len(student)
    counted = torch.empty_like(student)
    errors, energies = [], []
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        slices = (torch.split(maps, num_images) for maps in (student, teacher, counted))
        for student_part, teacher_part, counted_part in zip(*slices, strict=True):
            target, margin = reduce(teacher_part)
            difference = _counted(student_part, target, margin)
            errors.append(difference.square().sum())
            counted_part.copy_(difference)
            if with_energy:
                energies.append(_energy(target))
        error = sum(errors[1:], errors[0])
        energy = sum(energies, torch.zeros((), device=student.device))
    return _SumOfSquares.apply(student, error, counted), energy


def _energy(target: Tensor) -> Tensor:
    return target.clamp_min(0).float().square().sum()


class _SumOfSquares(torch.autograd.Function):
    """Return `error`, the sum of squares of `counted`, with its gradient for the student: 2 counted.

    Backward needs only one tensor of the student's type, `counted`.
    """

    @staticmethod
    def forward(context: Any, student: Tensor, error: Tensor, counted: Tensor) -> Tensor:
        context.save_for_backward(counted)
        return error.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (counted,) = context.saved_tensors
        factor = 2 * gradients[0]
        if counted.dtype == torch.float16:  # a small factor would be 0 in float16
            return (counted.float() * factor).half(), None, None
        return counted * factor.to(counted.dtype), None, None


def _counted(student: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """Return student - target' in float32, 0 where it does not count."""
    check_maps("partial_l2", student, target, same="shape")
    check_margin("partial_l2", margin, target, per_pixel=True)
    margin = margin.float()
    target = torch.maximum(target.float(), margin[:, None, None] if margin.ndim == 1 else margin)
    error = student.float() - target
    # It counts where target' > 0 or error > 0; `torch.where` would take several times as long on a CPU.
    counted: Tensor = torch.ops.aten.threshold_backward(error, torch.maximum(target, error), 0)
    return counted
