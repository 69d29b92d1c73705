"""The measurements of a run: accuracy, means of terms, and the files they are written to."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from classification.errors import UserError, quoted
from classification.runs.tracking import TensorBoard, Tracker
from classification.runs.world import World

STEPS = "steps.jsonl"


class Means:
    """Means of named values over images, summed on the device without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor], count: int) -> None:
        """Add the means of `values` over `count` images; a value may be missing from some calls."""
        for name, value in values.items():
            total = self.totals.setdefault(name, torch.zeros((), dtype=torch.float64, device=self.device))
            total += value.detach().mean() * count
            self.counts[name] = self.counts.get(name, 0) + count

    def means(self, world: World) -> dict[str, float]:
        """Return the means over the images of all ranks that a value was added for."""
        if not self.totals:
            return {}
        totals, counts = self._sums(world)
        return dict(zip(self.totals, (totals / counts).tolist(), strict=True))

    def collect(self, world: World) -> None:
        """Move the sums of all ranks to rank 0; the means over all ranks do not change."""
        if world.size > 1 and self.totals:
            totals, counts = (sums * world.first for sums in self._sums(world))
            self.totals = dict(zip(self.totals, totals.unbind(), strict=True))
            self.counts = dict(zip(self.totals, map(int, counts), strict=True))

    def _sums(self, world: World) -> tuple[Tensor, Tensor]:
        """Return totals and counts over all ranks, in the order of the names."""
        counts = torch.tensor([self.counts[name] for name in self.totals], dtype=torch.float64, device=self.device)
        totals, counts = world.sum(torch.stack([*self.totals.values(), *counts])).chunk(2)
        return totals, counts

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the sums of this rank and their counts."""
        return {"totals": dict(self.totals), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]], world: World) -> None:
        """Load the `state_dict` of rank 0 after `collect`: the sums on rank 0, zeros on the others."""
        totals, counts = state["totals"], state["counts"]
        if any(total.is_complex() for total in totals.values()):
            raise ValueError("its means are complex numbers")
        self.totals = {name: total.to(self.device).double().reshape(()) * world.first for name, total in totals.items()}
        self.counts = {name: int(counts[name]) * world.first for name in totals}


def hits(logits: Tensor, target: Tensor) -> Tensor:
    """Count the images whose class is the predicted one, and among the five likeliest (or all): (2,) float64."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]  # (B, 5)
    return torch.stack([best[:, 0].sum(), best.sum()]).double()


def tally(logits: Tensor, target: Tensor) -> Tensor:
    """Count `hits` and images, and sum the images' cross-entropy: (4,) float64."""
    loss = F.cross_entropy(logits.double(), target, reduction="sum")
    return torch.stack([*hits(logits, target), loss.new_tensor(len(target)), loss])


def result(total: Tensor) -> dict[str, float]:
    """Turn a sum of `tally` into percentages and a mean loss."""
    top1, top5, count, loss = total.tolist()
    return {"valid_top1": 100 * top1 / count, "valid_top5": 100 * top5 / count, "valid_loss": loss / count}


def accuracy(result: Mapping[str, float], num_classes: int, *, errors: bool = False) -> str:
    """Return a result in one line; top-5 is left out for five classes or fewer."""
    parts = []
    for number in (1, 5) if num_classes > 5 else (1,):
        top = result[f"valid_top{number}"]
        parts.append(f"top-{number} {top:.2f}" + (f" (Err@{number} {100 - top:.2f})" if errors else ""))
    return "  ".join([*parts, f"valid loss {result['valid_loss']:.4f}"])


def improves(measure: str, value: float, best: float | None) -> bool:
    """Return whether an epoch is better than all earlier ones; an equal or non-finite value is not.

    Args:
        measure: of --best-by; "loss" is better if it is smaller, all others if they are larger.
        value: of the epoch.
        best: of the best earlier epoch, or None.
    """
    if best is None or not math.isfinite(value):
        return math.isfinite(value)
    return value < best if measure == "loss" else value > best


class Journal:
    """The run folder's `metrics.jsonl` and `steps.jsonl`, and the trackers of a run; written by rank 0.

    Args:
        folder: the run folder.
        start: first epoch that will be written; lines of this and later epochs, from before a resume, are dropped.
        steps: number of steps of that epoch that are done; lines of later steps are dropped.
        trackers: also get every record; TensorBoard by default.
    """

    def __init__(self, folder: Path, start: int = 0, steps: int = 0, trackers: Sequence[Tracker] | None = None) -> None:
        self.path, self.steps_path = folder / "metrics.jsonl", folder / STEPS
        _cut(self.path, lambda line: line["epoch"] < start, "an epoch")
        _cut(self.steps_path, lambda line: (line["epoch"], line["step"]) < (start, steps + 1), "a step")
        self.trackers = [TensorBoard(folder, start)] if trackers is None else list(trackers)

    def write(self, record: dict[str, Any]) -> None:
        """Add one epoch."""
        with _explain_write_error(self.path):
            _append(self.path, record)
            for tracker in self.trackers:
                tracker.epoch(record)

    def write_step(self, record: dict[str, Any], number: int) -> None:
        """Add one step, the `number`th of the run, counted from 1."""
        with _explain_write_error(self.steps_path):
            _append(self.steps_path, record)
            for tracker in self.trackers:
                tracker.step(record, number)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self.trackers:
            tracker.close()


def _append(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


@contextlib.contextmanager
def _explain_write_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): make room; --resume resumes from last.pth"
        ) from error


def _cut(path: Path, keep: Callable[[Any], Any], what: str) -> None:
    """Drop the lines that `keep` rejects, and an incomplete last line."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = []
    for line in lines:
        try:
            kept += [line] if keep(json.loads(line)) else []
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged: {quoted(line)} is not a record of {what}; remove the line") from error
    beside = path.with_name(f"{path.name}.new")
    beside.write_text("".join(kept))
    beside.replace(path)
