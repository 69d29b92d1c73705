"""The short tables of docs/results/index.md, from the records of scripts/quality.yaml; make_tables.py calls it."""

from __future__ import annotations

from cells import count, differences, read_quality, top1
from draw_answers import WORTH
from results_table import Record

# Cells of scripts/quality.yaml: each group begins with the student alone that the others are compared with.
FIVE = ("alone", "kd-1.5", "amp", "ofd", "mgd-ofd")
TERMS = ("alone", "ofd-reviewkd", "mgd-ofd", "ofd", "amp", "reviewkd", "fitnet", "masked", "at-56", "dkd", "kd-4")
FEW_SGD = ("few-alone", "few-kept", "few-ofd")
FEW_MUON = ("few-muon-alone", "few-muon-kept", "few-muon-ofd", "few-muon-mgd-ofd", "init-few-muon-mgd-ofd")
CONTROLS = ("random, kept", "by index, kept")


def gain_table(*groups: tuple[str, ...]) -> str:
    """One line per cell: top-1, and the difference to the student alone, the first cell of its group."""
    cells, results = read_quality()
    lines = ["| | top-1 %, last epoch | n | difference to the student alone, paired by seed |", "|---|---|---|---|"]
    for base, *others in groups:
        for name in (base, *others):
            gain = _difference(results[name], results[base]) if name != base else ""
            lines.append(f"| {cells[name]['row']} | {top1(results[name])} | {count(results[name])} | {gain} |")
    return "\n".join(lines)


def worth_table() -> str:
    """One line per setting and control: the cheapest flow, the control, and the difference of the two."""
    _, results = read_quality()
    lines = [
        "| setting | other flow | cheapest flow, top-1 % | other flow, top-1 % | difference, paired by seed | n |",
        "|---|---|---|---|---|---|",
    ]
    for setting, (base, controls) in WORTH.items():
        for name in (name for name in CONTROLS if name in controls):
            found, best = results[controls[name]], results[base]
            pairs = {seed: found[seed] for seed in found if seed in best}
            gap = _difference(found, best)
            lines.append(f"| {setting} | {name} | {top1(best)} | {top1(found)} | {gap} | {count(pairs)} |")
    return "\n".join(lines)


def _difference(found: dict[int, Record], base: dict[int, Record]) -> str:
    """Return the paired differences, over the seeds that both have."""
    return differences([found[seed].last_top1 - base[seed].last_top1 for seed in sorted(set(found) & set(base))])
