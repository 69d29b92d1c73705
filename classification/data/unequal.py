"""Classes with unequal numbers of images: which images an epoch sees, and what cross-entropy weighs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

REPEAT = 1 << 32  # more than any epoch: the draws of an image's second time in an epoch are those of a far epoch


def shuffled(num: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return (num, 2): the epoch of the draws, and the index, of every image once."""
    order = np.random.default_rng([seed, epoch]).permutation(num)
    return np.stack([np.full(num, epoch), order], 1)


def balanced(labels: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """Return (n, 2) as `shuffled`, in which the classes are equally frequent, to within one image.

    Of n images of K classes each class has floor(n / K) or one more: a large class shows a part of its images, drawn
    anew every epoch, and a small one repeats all of its own. A repetition has draws of its own.

    Args:
        labels: (n,) class of every image.
        seed: of the run.
        epoch: counted from 0.
    """
    random = np.random.default_rng([seed, epoch, 2])
    classes = random.permutation(np.unique(labels))
    counts = np.full(len(classes), len(labels) // len(classes)) + (np.arange(len(classes)) < len(labels) % len(classes))
    parts = []
    for label, count in zip(classes, counts, strict=True):
        own = np.flatnonzero(labels == label)
        rounds = -(-int(count) // len(own))
        index = np.concatenate([random.permutation(own) for _ in range(rounds)])[:count]
        parts.append(np.stack([epoch + REPEAT * (np.arange(count) // len(own)), index], 1))
    return random.permutation(np.concatenate(parts))


def class_weights(labels: Sequence[int], num_classes: int) -> tuple[float, ...]:
    """Return n / (K n_c) for each of K classes with n_c of n images; their mean over the images is 1.

    A class without images has 1, and counts not towards K.
    """
    counts = np.bincount(labels, minlength=num_classes)
    weights = len(labels) / ((counts > 0).sum() * np.maximum(counts, 1))
    return tuple(float(weight) if count else 1.0 for weight, count in zip(weights, counts, strict=True))
