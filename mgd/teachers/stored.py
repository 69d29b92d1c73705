"""Compress a teacher's probabilities: keep the likeliest classes, and the total of all others."""

from __future__ import annotations

import torch
from torch import Tensor

from mgd.checks import check_tensors


def keep_top(log_probabilities: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `top` likeliest classes of each row, log p of each, and log m of all others together.

    m = sum over the classes that are not kept of p; log m is -inf if all are kept.

    Args:
        log_probabilities: (B, K), log p.
        top: k, 1 <= k <= K.

    Returns:
        (B, k) int64, best first, of equal ones the smaller index first; (B, k); (B,).

    Raises:
        ValueError: the argument is not a matrix, or k is outside [1, K].
    """
    check_tensors("keep_top", log_probabilities=log_probabilities)
    if log_probabilities.ndim != 2 or not 1 <= top <= log_probabilities.shape[1]:
        raise ValueError(f"keep_top needs (B, K) and 1 <= top <= K; got {tuple(log_probabilities.shape)} and {top}")
    values, classes = log_probabilities.sort(stable=True, dim=1, descending=True)
    return classes[:, :top], values[:, :top], values[:, top:].logsumexp(dim=1)


def spread_rest(classes: Tensor, log_probabilities: Tensor, rest: Tensor, num_classes: int) -> Tensor:
    """Return log-probabilities of all classes: log p for the kept ones, log(m / (K - k)) for each of the others.

    The rows can be used as logits z: softmax(z / tau) is the teacher's at any temperature tau, except that all classes
    that were not kept are equally likely.

    Args:
        classes: (B, k) int64, as `keep_top` returns them.
        log_probabilities: (B, k), log p of them.
        rest: (B,), log m.
        num_classes: K.

    Returns:
        (B, K) float32.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_tensors("spread_rest", classes=classes, log_probabilities=log_probabilities, rest=rest)
    if classes.ndim != 2 or classes.shape != log_probabilities.shape or rest.shape != classes.shape[:1]:
        shapes = [tuple(tensor.shape) for tensor in (classes, log_probabilities, rest)]
        raise ValueError(f"spread_rest needs (B, k), (B, k) and (B,); got {shapes}")
    others = num_classes - classes.shape[1]
    each = rest.float() - torch.tensor(float(max(others, 1)), device=rest.device).log()
    return each[:, None].repeat(1, num_classes).scatter(1, classes, log_probabilities.float())
