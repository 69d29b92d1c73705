"""Count how often compare.py calls equal recipes different: python scripts/check_verdict.py [--repetitions 20000]

Each repetition compares two recipes whose top-1 has the same normal distribution, and ends with the first verdict, as
compare.py does. Prints a table for docs/start/compare.md: the half width of the last interval, and the share of
repetitions that end with BETTER or WORSE.
"""

from __future__ import annotations

import argparse

import numpy as np

from classification.models.intervals import BETTER, WORSE
from classification.reports.verdict import Design, bounds, judge

SEEDS = (2, 3, 4, 5, 6, 8, 10)


def wrong(seeds: int, repetitions: int, margin: float) -> float:
    """Return the share of comparisons of equal recipes that end with BETTER or WORSE."""
    random, design, count = np.random.default_rng(seeds), Design(seeds=seeds, margin=margin), 0
    for differences in random.normal(0, 1.4, (repetitions, seeds)):
        verdicts = (judge(differences[:n].tolist(), design) for n in range(1, seeds + 1))
        count += next((v.word for v in verdicts if v.decided), "") in (BETTER, WORSE)
    return count / repetitions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20_000)
    parser.add_argument("--margin", type=float, default=0.5, help="in points; the difference of a seed scatters by 1.4")
    args = parser.parse_args()
    print("| k | " + " | ".join(map(str, SEEDS)) + " |\n|---" * 1 + "|---" * len(SEEDS) + "|")
    for recipes, name in ((1, "one recipe"), (2, "two recipes")):
        widths = (f"{bounds(seeds, 0.05 / recipes)[-1]:.2f}" for seeds in SEEDS)
        print(f"| half width after all k seeds, in standard errors, {name} | {' | '.join(widths)} |")
    shares = (f"{100 * wrong(seeds, args.repetitions, args.margin):.1f} %" for seeds in SEEDS)
    print(f"| equal recipes that are called BETTER or WORSE, of {args.repetitions:,} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
