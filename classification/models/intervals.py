"""Confidence intervals of differences in accuracy, and verdicts on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DRAWS = 10_000  # of the bootstrap
MARGIN = 0.5  # points of top-1: smaller differences do not matter by default
BETTER, WORSE, NO_DIFFERENCE, UNDECIDED = "BETTER", "WORSE", "NO DIFFERENCE", "UNDECIDED"


def difference_interval(right: Sequence[int]) -> tuple[float, float]:
    """Return the 95 % interval of the second's top-1 minus the first's, in points, by a paired bootstrap over images.

    Drawing images with replacement is the same as drawing the four counts from a multinomial distribution.

    Args:
        right: number of images that both classify correctly, only the first, only the second, neither.
    """
    images = sum(right)
    drawn = np.random.default_rng(0).multinomial(images, np.array(right) / images, DRAWS)
    low, high = np.quantile(100 * (drawn[:, 2] - drawn[:, 1]) / images, [0.025, 0.975])
    return float(low), float(high)


def visible_spread(differences: Sequence[float], resolution: float) -> float:
    """Return the standard deviation of differences of two rounded values, at least that of the rounding errors.

    The rounding error of each value is uniform, with variance resolution^2 / 12.
    """
    return max(float(np.std(differences, ddof=1)), resolution / math.sqrt(6))


def verdict(low: float, high: float, margin: float = MARGIN) -> str:
    """Return the verdict for the interval of a difference, in points.

    Returns:
        NO DIFFERENCE if the interval lies within `margin` of 0; else BETTER if it lies above 0, WORSE if below 0, and
        UNDECIDED if it contains 0.
    """
    if -margin <= low and high <= margin:
        return NO_DIFFERENCE
    return BETTER if low > 0 else WORSE if high < 0 else UNDECIDED
