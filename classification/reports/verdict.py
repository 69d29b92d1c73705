"""Judge whether a recipe is better than the control, by paired differences, after every seed (a sequential test)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

from classification.models.intervals import MARGIN, UNDECIDED, verdict, visible_spread

NUM_SIMULATIONS = 400_000  # simulated comparisons of two equal recipes
FEW = 200  # if fewer of them cross a bound, it is taken from the t distribution


@dataclass(frozen=True)
class Design:
    """The statistical design of a comparison, fixed before the first run.

    Args:
        seeds: largest number of seeds, at least 2.
        comparisons: number of recipes that are compared with the control, over all students.
        confidence: probability that all intervals contain their true differences, over all comparisons and looks.
        margin: differences up to this many points do not matter to the user.
        resolution: change in top-1, in points, by one image; it bounds the standard deviation from below.
    """

    seeds: int
    comparisons: int = 1
    confidence: float = 0.95
    margin: float = MARGIN
    resolution: float = 0.0

    @property
    def alpha(self) -> float:
        """The error probability of one comparison, by Bonferroni: (1 - confidence) / comparisons."""
        return (1 - self.confidence) / self.comparisons


@dataclass(frozen=True)
class Verdict:
    """The result of one comparison.

    Args:
        word: BETTER, WORSE, NO DIFFERENCE or UNDECIDED.
        difference: mean over the seeds, in points.
        interval: of the true mean, in points; infinite with one seed.
        seeds: number of seeds.
    """

    word: str
    difference: float
    interval: tuple[float, float]
    seeds: int

    @property
    def decided(self) -> bool:
        """Whether no more seeds are needed."""
        return self.word != UNDECIDED


def judge(differences: Sequence[float], design: Design) -> Verdict:
    """Judge the differences (recipe minus control, one per seed) so far.

    The interval is d +- c_n s / sqrt(n), with the mean d and standard deviation s of n differences, and c_n of
    `bounds`. It is valid after every seed, so the comparison may stop when the verdict is BETTER (interval above 0),
    WORSE (below 0) or NO DIFFERENCE (within the margin).

    Raises:
        ValueError: there are no differences, or more than the design has seeds.

    Reference: Jennison, Turnbull, 1989, repeated confidence intervals.
    """
    n = len(differences)
    if not 1 <= n <= design.seeds:
        raise ValueError(f"expected 1 to {design.seeds} differences, one per seed; got {n}")
    mean = float(np.mean(differences))
    if n == 1:
        return Verdict(UNDECIDED, mean, (-math.inf, math.inf), 1)
    spread = visible_spread(differences, design.resolution)
    half = bounds(design.seeds, design.alpha)[n - 2] * spread / math.sqrt(n)
    low, high = mean - half, mean + half
    return Verdict(verdict(low, high, design.margin), mean, (low, high), n)


def spent_alpha(alpha: float, part: float) -> float:
    """Return how much of `alpha` may be spent after a part of all seeds: 2 - 2 Phi(z_(1 - alpha/2) / sqrt(part)).

    Reference: Lan, DeMets, 1983, spending function of O'Brien-Fleming type.
    """
    return float(2 * stats.norm.sf(stats.norm.isf(alpha / 2) / math.sqrt(part)))


@cache
def bounds(seeds: int, alpha: float) -> tuple[float, ...]:
    """Return the bounds of |t| after 2, 3 ... `seeds` seeds.

    For equal recipes with normal differences, |t| first crosses the n-th bound with the probability that `spent_alpha`
    adds at n seeds. The bounds are found by simulation with a fixed seed. If that probability is tiny, the bound is the
    quantile of the t distribution, which is never too small.
    """
    random = np.random.default_rng(0)
    total, squares = np.zeros(NUM_SIMULATIONS), np.zeros(NUM_SIMULATIONS)
    not_crossed = np.ones(NUM_SIMULATIONS, dtype=bool)
    bounds_so_far, spent_before = [], 0.0
    for n in range(1, seeds + 1):
        draws = random.standard_normal(NUM_SIMULATIONS)
        total, squares = total + draws, squares + draws**2
        if n == 1:
            continue
        variance = np.maximum(squares - total**2 / n, 1e-300) / (n - 1)
        t = np.where(not_crossed, np.abs(total) / np.sqrt(n * variance), -1.0)
        spent_now = spent_alpha(alpha, n / seeds)
        t_quantile = float(stats.t.isf((spent_now - spent_before) / 2, n - 1))
        num_crossing = round((spent_now - spent_before) * NUM_SIMULATIONS)
        bounds_so_far.append(
            t_quantile
            if n == 2 or num_crossing < FEW
            else min(t_quantile, float(-np.partition(-t, num_crossing)[num_crossing]))
        )
        not_crossed &= t < bounds_so_far[-1]
        spent_before = spent_now
    return tuple(bounds_so_far)
