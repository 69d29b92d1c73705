"""Measure several ways of one job in alternation, and keep what was found: shared by the benchmarks."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from classification.options.config import describe
from mgd import has_bfloat16

# What is measured with and without bfloat16 in hardware is kept apart: the fast teacher is another one there.
KIND = "speed" if has_bfloat16(torch.device("cpu")) else "speed-float32"
RESULTS = Path(__file__).parents[1] / "results" / KIND


class Seconds(float):
    """What a way returns that has measured itself."""


def alternate(ways: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Return the seconds of every round of every way; each round runs them one after another, in turning order."""
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            found = ways[name]()
            if number >= 0:
                seconds[name].append(found if isinstance(found, Seconds) else time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> tuple[float, float, float]:
    """Return median, first and third quartile of slow / fast, round by round."""
    ratios = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios[0],) * 3
    return median(ratios), low, high


def question(what: str, seconds: Mapping[str, list[float]], slow: str, fast: str, target: str) -> dict[str, Any]:
    """Say and return one row of the speed table: how much faster `fast` is than `slow`."""
    middle, low, high = ratio(seconds, slow, fast)
    row = {"what": what, "ratio": middle, "quartiles": [low, high], "target": target, "slow": slow, "fast": fast}
    row["seconds"] = {name: median(seconds[name]) for name in (slow, fast)}
    row["rounds"] = len(seconds[slow])
    print(f"{what:60} {middle:6.2f} ({low:.2f} to {high:.2f}), target {target}", flush=True)
    return row


def keep(name: str, content: Mapping[str, Any]) -> None:
    """Write NAME.json into `RESULTS`: command, versions, commit, machine and what was found."""
    own = ("options", "command", "folder")
    about = {key: value for key, value in describe([], {}).items() if key not in own}
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = " ".join(["python", f"scripts/{Path(sys.argv[0]).name}", *words])
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"command": command, **about, **content}, indent=1) + "\n")
