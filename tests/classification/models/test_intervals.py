from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from classification.models.intervals import difference_interval, verdict, visible_spread


def test_the_interval_is_that_of_a_plain_paired_bootstrap() -> None:
    assert difference_interval([3, 0, 0, 2]) == (0, 0)
    right = [40, 5, 15, 20]
    difference = np.repeat([0, -1, 1, 0], right)
    plain = stats.bootstrap((100 * difference,), np.mean, n_resamples=10_000, method="percentile", rng=1)
    assert difference_interval(right) == pytest.approx(tuple(plain.confidence_interval), abs=1.3)  # an image is 1.25
    assert difference_interval(right) == difference_interval(right)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.5, 3.5, "BETTER"),
        (-3.5, -0.1, "WORSE"),
        (-0.5, 0.5, "NO DIFFERENCE"),
        (0.1, 0.4, "NO DIFFERENCE"),  # surely above 0, and too little to matter
        (0.0, 2.0, "UNDECIDED"),
        (-0.6, 0.5, "UNDECIDED"),
    ],
)
def test_the_word_for_an_interval(low: float, high: float, word: str) -> None:
    assert verdict(low, high) == word
    assert verdict(100 * low, 100 * high, margin=50) == word


def test_equal_differences_of_rounded_figures_have_the_spread_of_rounding() -> None:
    # Two figures of 1 point per image: each is off by a uniform error, of variance 1 / 12.
    assert visible_spread([2.0, 2.0, 2.0], 1.0) == pytest.approx((1 / 12 + 1 / 12) ** 0.5)
    assert visible_spread([1.0, 3.0], 1.0) == pytest.approx(2**0.5)
