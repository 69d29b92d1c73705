"""Check the arguments of public functions. Values of tensors are checked on the CPU only, never waiting for a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

import torch
from torch import Tensor


def check_positive(what: str, **values: float) -> None:
    """Refuse numbers that are not positive and finite.

    Raises:
        ValueError: a value is out of range; the message names function and argument.
        TypeError: a value is not a number.
    """
    _check_numbers(what, values)
    for name, value in values.items():
        if not 0 < value < inf:
            raise ValueError(f"{what}: {name} must be positive; got {value}")


def check_at_least_0(what: str, **values: float) -> None:
    """Refuse numbers that are negative or not finite.

    Raises:
        ValueError: a value is out of range; the message names function and argument.
        TypeError: a value is not a number.
    """
    _check_numbers(what, values)
    for name, value in values.items():
        if not 0 <= value < inf:
            raise ValueError(f"{what}: {name} must be at least 0; got {value}")


def check_counts(what: str, **values: int) -> None:
    """Refuse values that are not whole numbers of at least 1.

    Raises:
        ValueError: a value is below 1; the message names function and argument.
        TypeError: a value is not a whole number.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{what}: {name} must be a whole number; got {value!r}")
        if value < 1:
            raise ValueError(f"{what}: {name} must be positive; got {value}")


def _check_numbers(what: str, values: Mapping[str, object]) -> None:
    for name, value in values.items():
        if not hasattr(value, "__float__"):
            raise TypeError(f"{what}: {name} must be a number; got {value!r}")


def check_tensors(what: str, **tensors: object) -> None:
    """Refuse values that are not tensors.

    Raises:
        TypeError: a value is not a tensor; the message names function and argument.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{what}: {name} must be a tensor; got a {type(value).__name__}")


def _check_floating(what: str, **tensors: object) -> None:
    check_tensors(what, **tensors)
    for name, value in tensors.items():
        if isinstance(value, Tensor) and not value.is_floating_point():
            raise TypeError(f"{what}: {name} must hold floating-point numbers; got {value.dtype}")


def check_unused_target(what: str, target: object) -> None:
    """Refuse a third argument that is not a target, such as a temperature, in a loss that does not use its target.

    Raises:
        TypeError: it is neither a tensor nor None.
    """
    if target is not None and not isinstance(target, Tensor):
        raise TypeError(
            f"{what}: the third argument is the target, a tensor or None; got a {type(target).__name__}: "
            "pass what follows by name"
        )


def check_logits(what: str, student: Tensor, teacher: Tensor, *, min_classes: int = 1) -> None:
    """Refuse logits that are not (B, K) for as many images and classes of both networks.

    Args:
        what: name of the function that compares them.
        student: expected (B, K).
        teacher: expected (B, K).
        min_classes: smallest K.

    Raises:
        TypeError: an argument is not a tensor of floating-point numbers.
        ValueError: the shapes are wrong or differ, or there are no images or too few classes.
    """
    _check_floating(what, student=student, teacher=teacher)
    shapes = f"got {tuple(student.shape)} of the student, {tuple(teacher.shape)} of the teacher"
    if student.ndim > 2 and student.ndim == teacher.ndim:
        raise ValueError(
            f"{what} compares logits (B, K), one row per image; {shapes}: make one row per pixel or token first, "
            "by logits.movedim(1, -1).flatten(0, -2) where the classes are dimension 1"
        )
    if student.ndim != 2 or student.shape != teacher.shape or student.numel() == 0:
        raise ValueError(f"{what} compares logits (B, K) of the same images and classes, at least one each; {shapes}")
    if student.shape[1] < min_classes:
        raise ValueError(f"{what} needs {min_classes} classes or more; {shapes}")


def check_target(what: str, target: Tensor, logits: Tensor, *, mixed: bool) -> None:
    """Refuse a target that does not belong to logits (B, K).

    Args:
        what: name of the function that uses it.
        target: expected (B,) int64 class indices; their values are checked on the CPU only.
        logits: (B, K).
        mixed: whether (B, K) probabilities are accepted, too.

    Raises:
        TypeError: the target is not a tensor.
        ValueError: its shape or type is wrong, or an index is outside [0, K).
    """
    check_tensors(what, target=target)
    num_images, num_classes = logits.shape
    if mixed and target.shape == logits.shape and target.is_floating_point():
        return
    if target.shape != (num_images,) or target.dtype != torch.int64:
        more = f", or probabilities ({num_images}, {num_classes}) of mixed images" if mixed else ""
        raise ValueError(
            f"{what} needs a class index per image, ({num_images},) int64{more}; "
            f"got a target {tuple(target.shape)} of {target.dtype}"
        )
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(value) for value in target.aminmax())
        if not 0 <= low <= high < num_classes:
            raise ValueError(f"{what} needs class indices in [0, {num_classes}); got {low} to {high}")


def check_maps(what: str, student: Tensor, teacher: Tensor, *, same: str = "images") -> None:
    """Refuse maps that are not (B, C, H, W) of the same images.

    Args:
        what: name of the function that compares them.
        student: expected (B, S, H, W).
        teacher: expected (B, T, H', W').
        same: what must be equal besides the number of images: "images", nothing; "channels"; "resolution"; "shape",
            channels and resolution.

    Raises:
        TypeError: an argument is not a tensor of floating-point numbers.
        ValueError: the shapes are wrong or differ, or there are no images, channels or pixels.
    """
    _check_floating(what, student=student, teacher=teacher)
    a, b = tuple(student.shape), tuple(teacher.shape)
    shared = {"images": slice(0, 1), "channels": slice(0, 2), "resolution": slice(2, 4), "shape": slice(0, 4)}[same]
    are_maps = len(a) == len(b) == 4 and 0 not in a + b
    if not are_maps or a[:1] != b[:1] or a[shared] != b[shared]:
        wanted = {
            "images": "",
            "channels": " and channels",
            "resolution": " and resolution (choose such taps)",
            "shape": " and one shape",
        }
        raise ValueError(
            f"{what} compares maps (B, C, H, W) of the same images{wanted[same]}; got {a} of the student, "
            f"{b} of the teacher"
        )


def check_margin(what: str, margin: Tensor, maps: Tensor, *, per_pixel: bool) -> None:
    """Refuse a margin that is not (C,) for maps (B, C, H, W), or if `per_pixel`, (B, C, H, W).

    Raises:
        TypeError: the margin is not a tensor.
        ValueError: its shape is wrong.
    """
    check_tensors(what, margin=margin)
    if margin.shape != maps.shape[1:2] and not (per_pixel and margin.shape == maps.shape):
        more = f" or {tuple(maps.shape)}" if per_pixel else ""
        raise ValueError(f"{what} needs a margin ({maps.shape[1]},){more}; got {tuple(margin.shape)}")
