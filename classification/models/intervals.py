"""How sure a difference of two networks on the same images is, and the word for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DRAWS = 10_000  # of the bootstrap
MARGIN = 0.5  # points of top-1 that do not matter, unless a user says otherwise
BETTER, WORSE, SAME, OPEN = "BETTER", "WORSE", "NO DIFFERENCE", "UNDECIDED"


def difference_interval(right: Sequence[int]) -> tuple[float, float]:
    """Return the 95 % interval of the second's top-1 minus the first's, in points: paired bootstrap over the images.

    To draw images with replacement is to draw the four counts from a multinomial distribution.

    Args:
        right: images that both have right, the first alone, the second alone, neither.
    """
    images = sum(right)
    drawn = np.random.default_rng(0).multinomial(images, np.array(right) / images, DRAWS)
    low, high = np.quantile(100 * (drawn[:, 2] - drawn[:, 1]) / images, [0.025, 0.975])
    return float(low), float(high)


def visible_spread(differences: Sequence[float], resolution: float) -> float:
    """Return the standard deviation of differences of two rounded figures, at least that of rounding itself.

    Each figure is off by a uniform error of variance resolution^2 / 12.
    """
    return max(float(np.std(differences, ddof=1)), resolution / math.sqrt(6))


def verdict(low: float, high: float, margin: float = MARGIN) -> str:
    """Return the word for an interval of a difference, in points.

    Returns:
        NO DIFFERENCE where it lies within `margin` of 0, else BETTER above 0, WORSE below 0, UNDECIDED with 0 in it.
    """
    if -margin <= low and high <= margin:
        return SAME
    return BETTER if low > 0 else WORSE if high < 0 else OPEN
