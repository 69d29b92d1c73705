"""Verdicts: intervals worked out elsewhere, and how often equal recipes are called different."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from classification.reports.verdict import Design, bounds, judge, spent_alpha


def test_one_look_is_the_paired_t_interval() -> None:
    """With two seeds at most there is one look: the interval of scipy's paired t test."""
    verdict = judge([1.0, 2.0], Design(seeds=2))
    low, high = stats.t.interval(0.95, 1, loc=1.5, scale=math.sqrt(0.5) / math.sqrt(2))
    assert verdict.interval == pytest.approx((low, high))
    assert verdict.word == "UNDECIDED" and verdict.difference == 1.5


def test_alpha_is_spent_late_and_whole() -> None:
    """The two-sided 5 % spending function of O'Brien-Fleming type at halves and thirds, as tables have it."""
    assert [spent_alpha(0.05, part) for part in (1 / 3, 1 / 2, 2 / 3, 1)] == pytest.approx(
        [0.00069, 0.00557, 0.01637, 0.05], abs=1e-5
    )


def test_bounds_of_many_seeds_are_those_of_tables() -> None:
    """The last bound of a Brownian path that is watched all the time is 2.24 for 5 %; 40 looks are near it."""
    last = bounds(40, 0.05)[-1]
    assert 2.1 < last < 2.35
    found = bounds(8, 0.05)
    assert list(found) == sorted(found, reverse=True)


def test_words() -> None:
    design = Design(seeds=4, margin=0.5)
    assert judge([5.0, 5.1, 4.9, 5.0], design).word == "BETTER"
    assert judge([-5.0, -5.1, -4.9, -5.0], design).word == "WORSE"
    assert judge([0.01, -0.02, 0.0, 0.03], design).word == "NO DIFFERENCE"
    assert judge([5.0, -4.0, 1.0, 0.0], design).word == "UNDECIDED"
    assert judge([0.3, 0.31, 0.29, 0.3], design).word == "NO DIFFERENCE"  # real, and within the margin
    assert judge([0.3, 0.31, 0.29, 0.3], Design(seeds=4, margin=0.0)).word == "BETTER"
    assert judge([9.0], design).word == "UNDECIDED"


def test_more_comparisons_and_coarse_figures_widen_the_interval() -> None:
    values = [1.0, 1.1, 0.9]
    alone, many = (judge(values, Design(seeds=3, comparisons=m)).interval for m in (1, 4))
    assert many[1] - many[0] > 1.5 * (alone[1] - alone[0])
    same = judge([0.0, 0.0, 0.0], Design(seeds=3, resolution=2.0, margin=0.5))
    assert same.word == "UNDECIDED"  # of 50 images, three equal counts say little


def test_counts_outside_the_design_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 to 2 differences, one per seed; got 3"):
        judge([1.0, 1.0, 1.0], Design(seeds=2))


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_equal_recipes_are_rarely_called_different(seeds: int) -> None:
    """1,000 comparisons of two equal recipes, each ended by the first verdict: at most 6.5 % BETTER or WORSE."""
    random, design = np.random.default_rng(seeds), Design(seeds=seeds, margin=0.5)
    wrong = 0
    for _ in range(1000):
        values = random.normal(80, 1, (2, seeds))
        verdicts = (judge(list(values[0, :n] - values[1, :n]), design) for n in range(1, seeds + 1))
        word = next((v.word for v in verdicts if v.decided), "UNDECIDED")
        wrong += word in ("BETTER", "WORSE")
    assert 20 <= wrong <= 65


def test_a_difference_of_two_deviations_is_found() -> None:
    random, design = np.random.default_rng(1), Design(seeds=6, margin=0.5)
    ends = []
    for _ in range(200):
        values = list(random.normal(3, 1.4, 6))
        verdicts = [judge(values[:n], design) for n in range(1, 7)]
        ends.append(next((v for v in verdicts if v.decided), verdicts[-1]))
    assert sum(v.word == "BETTER" for v in ends) > 150
    assert min(v.seeds for v in ends) < 6
