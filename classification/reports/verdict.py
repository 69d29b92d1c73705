"""Whether one recipe is better than another: paired differences over seeds, looked at after every seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

from classification.models.intervals import MARGIN, UNDECIDED, verdict, visible_spread

PATHS = 400_000  # simulated comparisons of two equal recipes
FEW = 200  # of them; a bound that fewer would cross is taken from the t distribution


@dataclass(frozen=True)
class Design:
    """How sure a verdict must be, and how often it is looked for; fixed before the first run.

    Args:
        seeds: the most that will be run, at least 2.
        comparisons: how many recipes are compared with the control, over all students.
        confidence: the probability that no interval misses its true difference, over all comparisons and looks.
        margin: differences up to this many points do not matter to the user.
        resolution: points that one image is worth; a smaller spread than that of rounding cannot be seen.
    """

    seeds: int
    comparisons: int = 1
    confidence: float = 0.95
    margin: float = MARGIN
    resolution: float = 0.0

    @property
    def alpha(self) -> float:
        """The probability of an error that one comparison may spend: Bonferroni's (1 - confidence) / comparisons."""
        return (1 - self.confidence) / self.comparisons


@dataclass(frozen=True)
class Verdict:
    """The result of one comparison.

    Args:
        word: BETTER, WORSE, NO DIFFERENCE or UNDECIDED.
        difference: the mean over the seeds, in points.
        interval: of the true mean, in points; infinite with one seed.
        seeds: how many there are.
    """

    word: str
    difference: float
    interval: tuple[float, float]
    seeds: int

    @property
    def decided(self) -> bool:
        """Whether more seeds are not needed."""
        return self.word != UNDECIDED


def judge(differences: Sequence[float], design: Design) -> Verdict:
    """Judge the differences (recipe minus control, one per seed) that there are so far.

    The interval d +- c_n s / sqrt(n), with the mean d and the standard deviation s of n differences and c_n of
    `bounds`, holds at every look, so that the comparison may end as soon as it decides: BETTER above 0, WORSE below 0,
    NO DIFFERENCE within the margin.

    Raises:
        ValueError: no differences, or more of them than the design has seeds.

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


def spent(alpha: float, part: float) -> float:
    """Return how much of `alpha` may be spent at a part of all seeds: 2 - 2 Phi(z_(1 - alpha/2) / sqrt(part)).

    Reference: Lan, DeMets, 1983, the spending function of O'Brien-Fleming type.
    """
    return float(2 * stats.norm.sf(stats.norm.isf(alpha / 2) / math.sqrt(part)))


@cache
def bounds(seeds: int, alpha: float) -> tuple[float, ...]:
    """Return the bounds of |t| after 2, 3 ... `seeds` seeds.

    Each is crossed for the first time with the probability that `spent` adds at its look, where the recipes are equal
    and the differences normal. Looks that add next to nothing take the quantile of their own t distribution, which is
    never too small; the others are found by simulation, with a fixed seed.
    """
    random = np.random.default_rng(0)
    total, squares = np.zeros(PATHS), np.zeros(PATHS)
    inside = np.ones(PATHS, dtype=bool)
    found, before = [], 0.0
    for n in range(1, seeds + 1):
        drawn = random.standard_normal(PATHS)
        total, squares = total + drawn, squares + drawn**2
        if n == 1:
            continue
        variance = np.maximum(squares - total**2 / n, 1e-300) / (n - 1)
        t = np.where(inside, np.abs(total) / np.sqrt(n * variance), -1.0)
        now = spent(alpha, n / seeds)
        own = float(stats.t.isf((now - before) / 2, n - 1))
        crossing = round((now - before) * PATHS)
        found.append(own if n == 2 or crossing < FEW else min(own, float(-np.partition(-t, crossing)[crossing])))
        inside &= t < found[-1]
        before = now
    return tuple(found)
