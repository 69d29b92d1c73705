"""Write the tables and the figure of the documentation from files alone: python scripts/make_tables.py [--check]

A table stands between <!-- NAME --> and <!-- /NAME --> in README.md or docs/:

- "options", "losses": the code
- "speed", "speed-float32": results/NAME/*.json, of processors with and without bfloat16; "peers" one file of these
- "quality-GROUP": results/SUITE.csv, in the layout of scripts/quality.yaml
- "digits": results/demo.csv, where scripts/collect_run.py keeps the runs of `make demo`
- "int8", "exports", "huggingface": results/NAME.jsonl; "compare": results/compare_clothing.json

A record whose command is not that of its cell is refused. scripts/term_pages.py makes one page per term.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from statistics import mean
from typing import Any

from answer_tables import CONTROLS, FEW_MUON, FEW_SGD, FIVE, TERMS, gain_table, worth_table
from bench_huggingface import table as huggingface_table
from bench_int8 import table as int8_table
from bench_peers import table as peers_table
from cells import RESULTS, ROOT, count, differences, read_quality, spread
from check_export import table as exports_table
from collect_comparison import table as comparison_table
from draw import draw_growth, draw_quality, draw_speed, rows_of
from draw_answers import PLANNED, WORTH, draw_answers
from draw_concepts import draw_concepts
from experiment_tables import CIFAR10, PHOTOS, PRIMARY, RIVALS, budget_table, tests_table
from results_table import Record, TableError, read_table
from term_pages import default_weight, term_pages

from classification.options.parser import build_parser
from mgd.losses import LOSSES

PICTURES = ROOT / "docs" / "pictures"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
OTHERS = ("solvers", "listing", "peers")  # results of tables of their own
MEASURES = {"ratio": " x", "value": "", "seconds": " s"}  # what a row of the speed table holds, first one found


def options_table() -> str:
    """Every option of the two main scripts with its default, group by group."""
    parser = build_parser("main_mgd.py", distillation=True)
    shared = {o for action in build_parser("", distillation=False)._actions for o in action.option_strings}
    lines = []
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if action.option_strings and action.dest not in ("help", "help_all")
        ]
        if actions:
            lines += [f"## {str(group.title).capitalize()}", "", "| option | default | what it does |", "|---|---|---|"]
            lines += [_option_row(action, shared) for action in actions] + [""]
    return "\n".join(lines[:-1])


def _option_row(action: argparse.Action, shared: set[str]) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    default = "" if action.default in (None, "") or action.nargs == 0 else action.default
    if action.dest == "workers":
        default = "cores, 8 at most"
    if isinstance(default, list):
        default = " ".join(map(str, default))
    if isinstance(default, float):
        default = f"{default:g}"
    choices = f"`{'` `'.join(map(str, action.choices))}`; " if action.choices else ""
    only = "" if set(action.option_strings) <= shared else " (`main_mgd.py`)"
    return f"| {names} | {default} | {choices}{action.help}{only} |"


def losses_table() -> str:
    """Every term: what it is, its weight, what it reads, its hyper-parameters."""
    lines = ["| term | method | weight | reads | hyper-parameters |", "|---|---|---|---|---|"]
    for name, kind in LOSSES.items():
        module = inspect.getmodule(kind)
        method = (module.__doc__ or "").strip().rstrip(".")
        keys = [f"`{field.name}` {field.default}" for field in dataclasses.fields(kind.Hyper)]
        needs = {"index": "image positions", "views": "two views", "frozen": "frozen teachers"}
        where = {"maps": "maps, where tapped", "labels": "labels, where there are any"}
        reads = [*(needs.get(what, what) for what in sorted(kind.needs)), *(where[what] for what in sorted(kind.uses))]
        row = [
            f"[`{name}`](terms/{name}.md)",
            method,
            default_weight(kind),
            ", ".join(reads) or "logits",
            ", ".join(keys),
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def results_table(name: str) -> str:
    """One line per row of results, mean and deviation of the last epoch's top-1 over its seeds."""
    rows: dict[tuple[int, str], list[Record]] = defaultdict(list)
    for record in read_table(RESULTS / f"{name}.csv"):
        rows[record.order or 0, record.cell].append(record)
    lines = ["| | top-1 %, last epoch | top-5 % | seeds | seconds | parameters |", "|---|---|---|---|---|---|"]
    for (_, row), results in sorted(rows.items()):
        top1, top5 = spread([r.last_top1 for r in results]), spread([r.last_top5 for r in results])
        seconds = mean(r.seconds for r in results)
        lines.append(f"| {row} | {top1} | {top5} | {len(results)} | {seconds:.0f} | {results[0].parameters:,} |")
    return "\n".join([*lines, *measured_on([r for group in rows.values() for r in group])])


def measured_on(records: list[Record]) -> list[str]:
    """Say on what machines, with which versions and at which commits."""
    return _machines((r.cores, r.had_bfloat16, r.torch, r.commit) for r in records)


def _machines(found: Iterable[tuple[int, bool, str, str | None]]) -> list[str]:
    machines: dict[str, set[str]] = defaultdict(set)
    for number, bfloat16, torch, commit in found:
        cores = f"{number} CPU cores{'' if bfloat16 else ' without bfloat16'}"
        machines[f"{cores}, torch {torch}"].add((commit or "unknown")[:8])
    return [
        line
        for machine, commits in sorted(machines.items())
        for line in ("", f"Measured on {machine}, at commit {', '.join(sorted(commits))}.")
    ]


def quality_table(group: str) -> str:
    """One line per cell: top-1 of the last epoch, and the difference to another cell, paired by seed."""
    cells, results = read_quality()
    names = [name for name in rows_of(group, cells) if results[name]]
    published = any("published-code" in cells[name] for name in names if cells[name]["group"] == group)
    columns = ["", "top-1 %, last epoch", "best epoch", "n", "difference, paired by seed"]
    columns += ["published code"] * published
    lines = [_row(columns), "|" + "---|" * len(columns)]
    for name in names:
        found, cell = results[name], cells[name]
        other: str = cell.get("against", "")
        if not cell.get("own-teacher"):  # another than the row beside it, one per seed, or a stored one
            check_teacher(name, [*found.values(), *(results[other].values() if other else ())])
        shared = sorted(set(found) & set(results[other])) if other and group == cell["group"] else []
        gain = differences([found[s].last_top1 - results[other][s].last_top1 for s in shared]) if shared else ""
        gain += f" against {cells[other]['row']}" if gain else ""
        top1, best = (spread([getattr(r, key) for r in found.values()]) for key in ("last_top1", "best_top1"))
        last = [str(cell.get("published-code", ""))] * published
        lines.append(_row([cell["row"], top1, best, count(found), gain, *last]))
    return "\n".join([*lines, *measured_on([r for name in names for r in results[name].values()])])


def five_table() -> str:
    """Student alone, KD, MGD, OFD and MGD + OFD: top-1, and the difference to the student alone."""
    _, results = read_quality()
    return "\n".join([gain_table(FIVE), *measured_on([r for name in FIVE for r in results[name].values()])])


def _row(columns: list[str]) -> str:
    return "| " + "".join(f"{column} | " for column in columns).strip()


def check_teacher(name: str, results: list[Record]) -> None:
    """Refuse to average or compare students of different teachers; older records do not say which they had."""
    found = {r.teacher: f"{r.cell}, seed {r.seed}" for r in results if r.teacher not in (None, "none")}
    if len(found) > 1:
        sys.exit(f"{name}: {' and '.join(found.values())} had different teachers: run them again by one")


def changes_table(cells: dict[str, dict[str, Any]], results: dict[str, dict[int, Record]]) -> str:
    """One line per cell that matched more than once: how many of its pairs each later matching changed."""
    lines = [
        "| % of the pairs changed, mean over seeds | n | 2nd matching | 3rd | 4th | last |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(name for group in MATCHED for name in rows_of(group, cells)):
        runs = [[e["flow_changed"] for e in found.curve if "flow_changed" in e] for found in results[name].values()]
        if any(runs):
            means = [100 * mean(column) for column in zip(*runs, strict=True)]
            places = [means[place] if place < len(means) else None for place in (0, 1, 2)] + [means[-1]]
            shown = " | ".join("" if place is None else f"{place:.1f}" for place in places)
            lines.append(f"| {cells[name]['row']} | {len(runs)} | {shown} |")
    return "\n".join(lines)


def time_table(cells: dict[str, dict[str, Any]], results: dict[str, dict[int, Record]]) -> str:
    """One line per cell that measures time, where it had both cores to itself."""
    lines = ["| 2 threads | training and matching, min | whole command, min | top-1 % |", "|---|---|---|---|"]
    names = [name for name, cell in cells.items() if cell["group"] == "time"]
    found = [r for name in names for r in results[name].values() if r.threads == 2 and r.wall_seconds]
    for result in found:
        minutes = " | ".join(f"{value / 60:.1f}" for value in (result.seconds, result.wall_seconds or 0))
        lines.append(f"| {cells[result.cell]['row']} | {minutes} | {result.last_top1:.2f} |")
    return "\n".join([*lines, *measured_on(found)])


def terms_table() -> str:
    """One line per term alone and per sum of terms, the best first: top-1, and what a step costs."""
    cells, results = read_quality()
    names = [n for n in dict.fromkeys((*rows_of("main", cells), *rows_of("terms", cells))) if results[n]]
    names.sort(key=lambda name: -mean(r.last_top1 for r in results[name].values()))
    timed = RESULTS / "speed" / "terms.json"
    steps = json.loads(timed.read_text())["steps"] if timed.exists() else {}
    lines = ["| | top-1 %, last epoch | best epoch | n | ms per step | memory, MiB |", "|---|---|---|---|---|---|"]
    for name in names:
        found = list(results[name].values())
        top1, best = (spread([getattr(r, key) for r in found]) for key in ("last_top1", "best_top1"))
        step = f"{1e3 * steps[name]:.0f}" if name in steps else ""
        memory = [r.curve[-1]["peak_memory_mib"] for r in found if "peak_memory_mib" in r.curve[-1]]
        lines.append(
            f"| {cells[name]['row']} | {top1} | {best} | {count(results[name])} | {step} | "
            f"{f'{max(memory):.0f}' if memory else ''} |"
        )
    return "\n".join([*lines, *measured_on([r for n in names for r in results[n].values()])])


def speed_table(kind: str = "speed", only: tuple[str, ...] = ()) -> str:
    """One line per measured question, with its target; with `only`, these questions."""
    lines = ["| | measured | quartiles | target |", "|---|---|---|---|"]
    files = [path for path in sorted((RESULTS / kind).glob("*.json")) if path.stem not in OTHERS]
    results = [json.loads(path.read_text()) for path in files]
    rows = [row for result in results for row in result.get("rows", [])]
    for row in (row for row in rows if not only or row["what"] in only):
        value, unit = next((row[key], unit) for key, unit in MEASURES.items() if key in row)
        middle = " to ".join(f"{q:.2f}" for q in row.get("quartiles", []))
        lines.append(f"| {row['what']} | {value:.4g}{unit} | {middle} | {row['target']} |")
    about = ((r["machine"], r["versions"]["torch"], r["commit"]) for r in results)
    return "\n".join([*lines, *_machines((m["cores"], m.get("bfloat16", True), *rest) for m, *rest in about)])


# Groups that match again.
MATCHED = ("main", "flow", "trained", "short", "few", "longer", "widths", "terms", "muon", "photographs")
HEADLINES = (
    "step of mobilenet_v1: plain / ours",
    "step of mobilenet_v1: ours / floor",
    "step of mobilenet_v1: ours, the teacher ahead / floor",
    "step of mobilenet_v2_mgd: plain / ours",
    "memory of a step of mobilenet_v1: plain / ours",
    "memory of a step of mobilenet_v1: ours / floor",
    "memory of a step of mobilenet_v1: ours, the teacher ahead / floor",
    "ResNet-50 forward: eager / fast",
    "flows of four stages: arc by arc / auto",
    "reading, one core: torchvision / ours",
    "seconds from the command to the first forward",
)


def energy_table() -> str:
    """Share of a teacher's energy that groups of its channels carry, and how it was measured."""
    record = json.loads((RESULTS / "energy_kept.json").read_text())
    lines = [
        "| T/S | groups | best weights, after the ReLU | maximum, after | best weights, before | AMP, before |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        sizes = f"{row['teacher_channels'] // row['student_channels']}"
        lines.append(f"| {sizes} | {row['groups']} | {' | '.join(f'{value:.3f}' for value in row['mean'])} |")
    return "\n".join([*lines, "", f"`{record['command']}`"])


def solvers_table() -> str:
    """Seconds and MiB of every solver, against the number of student channels, and the fitted exponents."""
    found = [path for kind in ("speed", "speed-float32") if (path := RESULTS / kind / "solvers.json").exists()]
    if not found:
        raise TableError("there is no results/speed*/solvers.json: run python scripts/bench_growth.py --solvers")
    record = json.loads(found[0].read_text())
    sizes = sorted({size for curve in record["curves"] for size in curve["sizes"]})

    def number(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    lines = [
        f"| solver | S = {' | '.join(f'{size:,}' for size in sizes)} | exponent |",
        "|---" * (len(sizes) + 2) + "|",
    ]
    for curve in record["curves"]:
        values = dict(zip(curve["sizes"], curve["values"], strict=True))
        cells = [f"{number(values[size])} {curve['unit']}" if size in values else "" for size in sizes]
        solver = curve["what"].removeprefix("flow, ")
        lines.append(f"| {solver} | {' | '.join(cells)} | {curve['exponent']:.1f} |")
    return "\n".join([*lines, "", f"{record['machine']['processor']}; `{record['command']}`"])


MADE: dict[str, Callable[[], str]] = {
    "huggingface": huggingface_table,
    "int8": int8_table,
    "exports": exports_table,
    "peers": peers_table,
    "compare": partial(comparison_table, "compare_clothing"),
    "options": options_table,
    "losses": losses_table,
    "energy": energy_table,
    "solvers": solvers_table,
    "five": five_table,
    "which-term": partial(gain_table, TERMS),
    "flow-worth": partial(worth_table, WORTH, CONTROLS),
    "flow-planned": partial(worth_table, PLANNED),
    "few-short": partial(gain_table, FEW_SGD, FEW_MUON),
    "transport-primary": partial(tests_table, PRIMARY),
    "transport-budget": partial(budget_table, CIFAR10),
    "photographs-primary": partial(tests_table, RIVALS),
    "photographs-budget": partial(budget_table, PHOTOS),
    "digits": partial(results_table, "demo"),
    "speed": speed_table,
    "terms": terms_table,
    "cell-time": lambda: time_table(*read_quality()),
    "flow-changes": lambda: changes_table(*read_quality()),
    "speed-float32": partial(speed_table, "speed-float32"),
    "speed-short": partial(speed_table, only=HEADLINES),
}
# By figure and panel, groups and cells.
FIGURES: dict[str, dict[str, tuple[str, ...]]] = {
    "quality": {
        "SGD, 20 epochs": ("main", "ofd", "mgd-ofd", "ofd-reviewkd"),
        "Muon, 20 epochs": ("muon-alone", "muon-amp", "muon-ofd", "muon-mgd-ofd"),
        "60 epochs": ("long-alone", "long-amp", "long-muon-alone", "long-ofd"),
        "Photographs": ("photographs",),
    },
    "quality-flow": {
        "Which flow: from scratch, 20 epochs": ("alone", "flow"),
        "5 epochs": ("short",),
        "1,000 images, SGD": ("few-alone", "few-amp", "few-kept", "few-random", "few-ofd"),
        "1,000 images, Muon": (
            *("few-muon-alone", "few-muon-kept", "few-muon-random", "few-muon-ofd"),
            *("few-muon-mgd-ofd", "few-muon-mgd-ofd-random"),
        ),
        "Trained on the labels before": ("trained",),
    },
    "quality-init": {
        "1,000 images, SGD": ("few-ofd", "init-few", "init-few-random", "few-ofd-float32", "init-few-float32"),
        "1,000 images, Muon": (
            *("few-muon-ofd", "init-few-muon", "init-few-muon-random"),
            *("few-muon-mgd-ofd", "init-few-muon-mgd-ofd"),
        ),
        "Trained on the labels before, 5 epochs": ("again-ofd", "init-again", "init-again-random"),
        "5 epochs": ("short-ofd", "init-short"),
        "20 epochs": ("ofd", "init-ofd", "muon-ofd", "init-muon"),
    },
}


def fill(text: str) -> str:
    """Return a page with every table renewed."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        content = MADE[name]() if name in MADE else quality_table(name.removeprefix("quality-"))
        return f"<!-- {name} -->\n{content}\n<!-- /{name} -->"

    return re.sub(r"<!-- (?P<name>[a-z0-9_-]+) -->\n.*?<!-- /(?P=name) -->", table, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    args = parser.parse_args()
    try:
        made = term_pages()
        made |= {page: fill(page.read_text()) for page in PAGES if page not in made}
    except TableError as error:
        sys.exit(str(error))
    stale = [page.name for page, text in made.items() if not page.exists() or page.read_text() != text]
    if not args.check:
        for page, text in made.items():
            page.write_text(text)
    if args.check and stale:
        sys.exit(f"{', '.join(stale)} not up to date: run python scripts/make_tables.py")
    if not args.check:
        for name, panels in FIGURES.items():
            draw_quality(panels, PICTURES / f"{name}.png")
        for kind in ("speed", "speed-float32"):
            draw_speed(kind, PICTURES / f"{kind}.png")
        draw_growth(PICTURES / "growth.png")
        draw_answers(PICTURES)
        draw_concepts(PICTURES)


if __name__ == "__main__":
    main()
