"""Keep what `mgd compare` found: python scripts/collect_comparison.py FOLDER NAME

Writes results/NAME.json: comparison.json of its --output FOLDER without folders of the machine, and the versions,
commits and processor of its runs. make_tables.py shows it as the table "compare".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cells import RESULTS
from collect_run import without_folders


def collect(folder: Path) -> dict[str, Any]:
    """Return what is kept of a comparison."""
    found: dict[str, Any] = without_folders(json.loads((folder / "comparison.json").read_text()))
    configs = [json.loads((folder / run["folder"] / "config.json").read_text()) for run in found["runs"]]
    about = {name: configs[0][name] for name in ("versions", "machine")}
    return {**found, **about, "commits": sorted({config["commit"] for config in configs})}


def table(name: str) -> str:
    """Return a comparison that was kept as a table."""
    kept = json.loads((RESULTS / f"{name}.json").read_text())
    verdicts = {(c["student"], c["recipe"]): c for c in kept["comparisons"]}
    lines = [
        "| student | recipe | top-1 %, last epoch | seeds | against alone, paired | interval | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for pair in dict.fromkeys((run["student"], run["recipe"]) for run in kept["runs"]):
        values = [run["top1"] for run in kept["runs"] if (run["student"], run["recipe"]) == pair]
        row = [*pair, f"{mean(values):.2f} ± {stdev(values):.2f}", str(len(values)), "", "", ""]
        if found := verdicts.get(pair):
            low, high = found["interval"]
            row[4:] = [f"{found['difference']:+.2f}", f"{low:+.2f} to {high:+.2f}", found["verdict"]]
        lines.append(f"| {' | '.join(row)} |")
    where = f"{kept['machine']['cores']} CPU cores, torch {kept['versions']['torch']}"
    commits = ", ".join(commit[:8] for commit in kept["commits"])
    return "\n".join([*lines, "", f"Measured on {where}, at commit {commits}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    args = parser.parse_args()
    path = RESULTS / f"{args.name}.json"
    path.write_text(json.dumps(collect(args.folder), indent=1) + "\n")
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
