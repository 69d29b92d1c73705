"""Keep what a run measured: python scripts/collect_run.py RUN TABLE ROW [--order N]

Writes scripts/results/TABLE/<ROW>-<seed>.json from the run folder: command, options, versions, commit, machine, seed,
top-1 and top-5 of the last epoch and of the best one, seconds, parameters and the curve.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def collect(run: Path) -> dict[str, Any]:
    """Read one run folder."""
    config = json.loads((run / "config.json").read_text())
    curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(run / "best.pth", weights_only=True)["state_dict"]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    seconds = sum(line["train_seconds"] + line.get("match_seconds", 0) for line in curve)
    best = max(curve, key=lambda line: line["valid_top1"])
    return {
        **{key: config[key] for key in ("command", "options", "versions", "commit", "machine")},
        "seed": config["options"]["seed"],
        "last_top1": curve[-1]["valid_top1"],
        "last_top5": curve[-1]["valid_top5"],
        "best_top1": best["valid_top1"],
        "best_epoch": best["epoch"],
        "seconds": seconds,
        "parameters": sum(v.numel() for n, v in state.items() if not n.endswith(buffers)),
        "curve": curve,
    }


def without_folders(value: Any) -> Any:
    """Keep file names, not folders of the machine that ran it."""
    if isinstance(value, dict):
        return {key: without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("table")
    parser.add_argument("row")
    parser.add_argument("--order", type=int, default=0, help="place of the row in its table")
    args = parser.parse_args()
    result = {"row": args.row, "order": args.order, **collect(args.run)}
    result = without_folders(result)
    name = re.sub(r"[^a-z0-9]+", "-", args.row.lower()).strip("-")
    path = RESULTS / args.table / f"{name}-{result['seed']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
