"""The short tables of docs/results/index.md, from the records of scripts/quality.yaml; make_tables.py calls it."""

from __future__ import annotations

from cells import count, differences, read_quality, top1
from draw_answers import Settings, worth_rows
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


def worth_table(settings: Settings, names: tuple[str, ...] = ()) -> str:
    """One line per setting and control, all or the named ones: the cheapest flow, the control, and their difference."""
    _, results = read_quality()
    lines = [
        "| setting | instead | cheapest flow, top-1 % | instead, top-1 % | difference, paired by seed | n |",
        "|---|---|---|---|---|---|",
    ]
    for setting, base, name, cell, gaps in worth_rows(results, settings):
        if not names or name in names:
            pairs = count({seed: results[cell][seed] for seed in gaps})
            row = [setting, name, top1(results[base]), top1(results[cell]), differences(list(gaps.values())), pairs]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _difference(found: dict[int, Record], base: dict[int, Record]) -> str:
    """Return the paired differences, over the seeds that both have."""
    return differences([found[seed].last_top1 - base[seed].last_top1 for seed in sorted(set(found) & set(base))])
