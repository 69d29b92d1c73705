"""The tables of the experiments that scripts/transport.yaml plans, from results/*.csv, for make_tables.py.

A comparison counts when all of its planned seeds are there; until then the table says how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

from cells import count, differences, read_quality, top1
from results_table import TableError
from scipy.optimize import brentq
from scipy.stats import nct, t, ttest_1samp

PRIMARY = (("first-2", "kept-2"), ("first-2", "ofd-2"), ("first-4", "kept-4"), ("first-4", "ofd-4"))
LEVEL, POWER = 0.05, 0.8
SETTINGS = ("-low", "", "-high")


@dataclass(frozen=True)
class Budget:
    """Terms with three settings each: the cells BEFOREtune-TERM-low, BEFOREtune-TERM, BEFOREtune-TERM-high."""

    before: str
    terms: tuple[str, ...]
    heads: tuple[str, str, str]  # what the settings are called

    def settings(self, term: str) -> list[str]:
        return [f"{self.before}tune-{term}{setting}" for setting in SETTINGS]

    def tuned(self, term: str) -> str:
        return f"{self.before}tuned-{term}"


CIFAR10 = Budget(
    "", ("mgd", "ofd", "kd", "dkd", "wkd"), ("a third of the weight", "the source's weight", "three times it")
)
PHOTOS = Budget(
    "photos-",
    ("mgd", "ofd", "reviewkd", "fitnet", "at", "similarity", "wkd", "masked"),
    ("equal gradients", "four times that weight", "sixteen times it"),
)
RIVALS = tuple((PHOTOS.tuned("mgd"), PHOTOS.tuned(term)) for term in PHOTOS.terms[1:])


def holm(found: Sequence[float]) -> list[float]:
    """Return the p-values of several tests, corrected for their number: Holm's, which never exceed 1.

    p_(i) becomes max_{j <= i} (m - j + 1) p_(j), with p_(1) <= ... <= p_(m).

    Reference: Holm, 1979.
    """
    corrected, largest = [0.0] * len(found), 0.0
    for rank, place in enumerate(sorted(range(len(found)), key=lambda index: found[index])):
        largest = max(largest, min(1.0, (len(found) - rank) * found[place]))
        corrected[place] = largest
    return corrected


def detectable(deviation: float, num: int, level: float = LEVEL) -> float:
    """Return the true difference that a paired two-sided t-test of `num` seeds shows with a probability of 80 %.

    Args:
        deviation: standard deviation of the differences over seeds.
        num: of seeds, at least 2.
        level: probability of an error of the test.
    """
    bound = float(t.isf(level / 2, num - 1))

    def missing(shift: float) -> float:  # its other tail adds next to nothing
        return float(nct.sf(bound, num - 1, shift)) - POWER

    return float(brentq(missing, 0, 1e3)) * deviation / sqrt(num)


def tests_table(compared: Sequence[tuple[str, str]]) -> str:
    """Return planned comparisons of two cells: two-sided paired t-tests over seeds, corrected by Holm."""
    cells, results = read_quality()
    seeds = [cells[name]["seeds"] if name in cells else [] for name, _ in compared]
    pairs = []
    for (name, other), planned in zip(compared, seeds, strict=True):
        shared = sorted(set(results[name]) & set(results[other]) & set(planned))
        pairs.append([results[name][seed].last_top1 - results[other][seed].last_top1 for seed in shared])
    whole = all(planned and len(gaps) == len(planned) for gaps, planned in zip(pairs, seeds, strict=True))
    values = [float(ttest_1samp(gaps, 0).pvalue) if whole else 1.0 for gaps in pairs]
    lines = [
        "| top-1 %, last epoch | against | difference, paired by seed | n | p | p, Holm | seen with 80 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, other), gaps, p, corrected in zip(compared, pairs, values, holm(values), strict=True):
        if not gaps:
            continue
        row = [f"{cells[one]['row']}: {top1(results[one])}" for one in (name, other)]
        row += [differences(gaps), f"{len(gaps)}"]
        row += [f"{p:.3f}", f"{corrected:.3f}", f"{detectable(stdev(gaps), len(gaps)):.2f}"] if whole else ["", "", ""]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def budget_table(budget: Budget) -> str:
    """Return terms with three settings each: top-1 on held-out images, and that of the best on valid."""
    cells, results = read_quality()
    heads = ["term", *budget.heads, "chosen", "top-1 % on valid", "n"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for term in budget.terms:
        names, tuned = budget.settings(term), budget.tuned(term)
        found = [mean(r.last_top1 for r in results[name].values()) if results[name] else None for name in names]
        known = [value for value in found if value is not None]
        row = ["" if value is None else f"{value:.2f}" for value in found]
        chosen = cells[names[found.index(max(known))]] if len(known) == len(SETTINGS) else None
        if chosen is not None and tuned in cells and cells[tuned].get("options") != chosen.get("options"):
            raise TableError(f"the cell {tuned} has other options than the best setting, {chosen['row']}")
        row += [chosen["row"] if chosen else "", top1(results[tuned]), count(results[tuned]) if results[tuned] else ""]
        lines.append(f"| {term} | {' | '.join(row)} |")
    return "\n".join(lines)
