"""Keep what a run measured: python scripts/collect_run.py RUN TABLE ROW [--order N]

Inserts one record into results/TABLE.csv, and its curve into results/TABLE_curves.csv, or replaces that of the same row
and seed. What a record holds: scripts/results_table.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from cells import RESULTS, read_suites
from results_table import Record, TableError, keep_record, measures


def collect(
    run: Path, cell: str, *, order: int | None = None, wall_seconds: float | None = None, threads: int | None = None
) -> Record:
    """Read one run folder.

    Args:
        run: the folder.
        cell: its name in its table.
        order: place of the row in its table, where no list of cells says it.
        wall_seconds: of the whole command, where it ran in one go.
        threads: of the run, where its folder does not say.
    """
    config = json.loads((run / "config.json").read_text())
    curve = [_numbers(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(run / "best.pth", weights_only=True)["state_dict"]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    machine, versions, options = config["machine"], dict(config["versions"]), config["options"]
    return Record(
        cell=cell,
        seed=options["seed"],
        **measures(curve),
        wall_seconds=wall_seconds,
        parameters=sum(v.numel() for n, v in state.items() if not n.endswith(buffers)),
        threads=machine.get("threads", threads),
        cores=machine["cores"],
        bfloat16=machine.get("bfloat16"),
        processor=machine["processor"],
        torch=versions.pop("torch"),
        commit=config["commit"],
        teacher=teacher_digest(options, Path(config["folder"])),
        order=order,
        command=shlex.join(without_folders(config["command"])),
        versions=versions,
        options=without_folders(options),
        curve=curve,
    )


def _numbers(epoch: dict[str, Any]) -> dict[str, float]:
    """Keep the epoch a whole number, and make every metric a float."""
    return {name: value if name == "epoch" else float(value) for name, value in epoch.items()}


def teacher_digest(options: dict[str, Any], folder: Path) -> str:
    """Return the first 16 digits of the SHA-256 of the teacher's file; of several teachers, joined by "+".

    Args:
        options: of the run.
        folder: where it was started.

    Returns:
        "none" without a frozen teacher; "pretrained" in the place of weights that have no file of their own. For a
        stored teacher, "stored" and the digest that the cache has of its weights and preprocessing.
    """
    if cache := options.get("teacher_cache"):
        plan = json.loads((folder / cache / "teacher_cache.json").read_text())
        return f"stored {plan['teacher'][:16]}"
    files = [teacher["resume"] for teacher in options.get("teachers", []) if teacher.get("frozen", True)]
    digests = [
        hashlib.sha256((folder / file).read_bytes()).hexdigest()[:16] if file else "pretrained" for file in files
    ]
    return "+".join(digests) or "none"


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
    if args.table in read_suites():
        sys.exit(f"{args.table} is a suite of cells: scripts/bench_quality.py keeps its records")
    path = RESULTS / f"{args.table}.csv"
    try:
        keep_record(path, collect(args.run, args.row, order=args.order))
    except (OSError, TableError) as error:
        sys.exit(str(error))
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
