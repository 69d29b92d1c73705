"""A record of a measurement for tests; scripts/ must be on the path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from results_table import Record


def record(cell: str, seed: int, **changes: Any) -> Record:
    """Return a record of two epochs, some of its fields changed."""
    from results_table import Record

    curve = [
        {"epoch": 0, "train_seconds": 20.0, "match_seconds": 10.0, "valid_top1": 50.25, "valid_top5": 80.0},
        {"epoch": 1, "train_seconds": 30.0, "valid_top1": 50.0, "valid_top5": 90.0},
    ]
    fields: dict[str, Any] = {
        "cell": cell,
        "seed": seed,
        "last_top1": 50.0,
        "last_top5": 90.0,
        "best_top1": 50.25,
        "best_epoch": 0,
        "seconds": 60.0,
        "wall_seconds": 0.1 + 0.2,
        "parameters": 1000,
        "threads": 2,
        "cores": 2,
        "bfloat16": True,
        "processor": "a processor, of two cores",
        "torch": "2.15.0",
        "commit": "abcdef0123456789",
        "teacher": "0123456789abcdef",
        "order": None,
        "command": f"main_mgd.py data-1000 --epochs 2 --seed {seed} --output {cell}-{seed}",
        "versions": {"python": "3.11.7"},
        "options": {"epochs": 2, "seed": seed, "lr": 1e-05, "taps": None, "arch": 'a "quoted", name'},
        "curve": curve,
    }
    return Record(**{**fields, **changes})
