"""Write the README's tables from files alone: python scripts/make_tables.py [--check]

The tables stand between <!-- NAME --> and <!-- /NAME --> in README.md: the options from the parsers, the measured
tables from scripts/results/NAME/*.json, which scripts/collect_run.py makes from run folders.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from classification.config import build_parser

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results"


def options_table() -> str:
    """Every option of the two main scripts with its default."""
    parser = build_parser("main_mgd.py", distillation=True)
    shared = {o for action in build_parser("", distillation=False)._actions for o in action.option_strings}
    lines = ["| option | default | what it does |", "|---|---|---|"]
    for action in parser._actions:
        if not action.option_strings or action.dest == "help":
            continue
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
        lines.append(f"| {names} | {default} | {choices}{action.help}{only} |")
    return "\n".join(lines)


def results_table(name: str) -> str:
    """One line a row of results, mean and deviation of the last epoch's top-1 over its seeds."""
    rows: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted((RESULTS / name).glob("*.json")):
        result = json.loads(path.read_text())
        rows[result["order"], result["row"]].append(result)
    lines = ["| | top-1 %, last epoch | top-5 % | seeds | seconds | parameters |", "|---|---|---|---|---|---|"]
    for (_, row), results in sorted(rows.items()):
        top1, top5 = spread([r["last_top1"] for r in results]), spread([r["last_top5"] for r in results])
        seconds = mean(r["seconds"] for r in results)
        lines.append(f"| {row} | {top1} | {top5} | {len(results)} | {seconds:.0f} | {results[0]['parameters']:,} |")
    machines = {(r["machine"]["cores"], r["versions"]["torch"]) for group in rows.values() for r in group}
    commits = sorted({(r["commit"] or "unknown")[:8] for group in rows.values() for r in group})
    for cores, torch in sorted(machines):
        lines += ["", f"Measured on {cores} CPU cores, torch {torch}, at commit {', '.join(commits)}."]
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{values[0]:.2f}" if len(values) == 1 else f"{mean(values):.2f} ± {stdev(values):.2f}"


def fill(text: str) -> str:
    """Return the README with every table made anew."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        content = options_table() if name == "options" else results_table(name)
        return f"<!-- {name} -->\n{content}\n<!-- /{name} -->"

    return re.sub(r"<!-- (?P<name>[a-z_]+) -->\n.*?<!-- /(?P=name) -->", table, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether README.md is up to date")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    filled = fill(text)
    if args.check and filled != text:
        sys.exit("README.md is not up to date: run python scripts/make_tables.py")
    readme.write_text(filled)


if __name__ == "__main__":
    main()
