"""The order of images in an epoch, also for classes of unequal size, and class weights for cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

REPEAT = 1 << 32  # more than any epoch: added to the epoch for the draws of an image's second use in an epoch


def shuffled_epoch(num: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return (num, 2): (epoch for the draws, index) of every image once, in random order."""
    order = np.random.default_rng([seed, epoch]).permutation(num)
    return np.stack([np.full(num, epoch), order], 1)


def balanced_epoch(labels: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """Return (n, 2) as `shuffled_epoch` does, with classes that are equally frequent.

    With n images and K classes, each class gets floor(n / K) images or one more. Of a large class, some images are
    drawn in every epoch. The images of a small class are repeated, each time with other random transforms.

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
        indices = np.flatnonzero(labels == label)
        rounds = -(-int(count) // len(indices))
        index = np.concatenate([random.permutation(indices) for _ in range(rounds)])[:count]
        parts.append(np.stack([epoch + REPEAT * (np.arange(count) // len(indices)), index], 1))
    return random.permutation(np.concatenate(parts))


def class_weights(labels: Sequence[int], num_classes: int) -> tuple[float, ...]:
    """Return the weight n / (K n_c) of each of K classes with n_c of n images; the mean over the images is 1.

    A class without images has weight 1 and is not counted in K.
    """
    counts = np.bincount(labels, minlength=num_classes)
    weights = len(labels) / ((counts > 0).sum() * np.maximum(counts, 1))
    return tuple(float(weight) if count else 1.0 for weight, count in zip(weights, counts, strict=True))
