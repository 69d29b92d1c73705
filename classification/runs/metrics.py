"""What a run measures: accuracy, means of terms, and the files they go to."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from classification.errors import UserError, shown
from classification.runs import matchings
from classification.runs.world import World

# Groups of TensorBoard, by the names of the metrics that belong to each: the first that fits.
GROUPS = {
    r"(train|valid)_loss(_.*)?": "loss",
    r"train_top[15]|valid_.*": "accuracy",
    r"gradient_share_.*": "gradient_share",
    r".*flow_.*|.*match_seconds": "flow",
    r"train_seconds": "run",
    r"train_.*_weighted": "terms_weighted",
    r"train_.*": "terms",
}
PICTURE = (96, 240)  # rows and columns of a flow's picture at most


class Means:
    """Means over images of named values, summed on the device without waiting for it."""

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
        counts = torch.tensor([self.counts[name] for name in self.totals], dtype=torch.float64, device=self.device)
        sums = world.sum(torch.stack([*self.totals.values(), *counts]))
        totals, counts = sums.chunk(2)
        return dict(zip(self.totals, (totals / counts).tolist(), strict=True))

    def collect(self, world: World) -> None:
        """Bring the sums of all ranks to the first; the means stay what they are."""
        if world.size > 1 and self.totals:
            counts = torch.tensor([self.counts[name] for name in self.totals], dtype=torch.float64, device=self.device)
            sums = world.sum(torch.stack([*self.totals.values(), *counts])) * world.first
            self.totals = dict(zip(self.totals, sums[: len(self.totals)].unbind(), strict=True))
            self.counts = dict(zip(self.totals, map(int, sums[len(self.totals) :]), strict=True))

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the sums of this rank and their counts."""
        return {"totals": dict(self.totals), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]], world: World) -> None:
        """Load what rank 0's `state_dict` returned after `collect`: sums on rank 0, only names on the others."""
        totals, counts = state["totals"], state["counts"]
        if any(total.is_complex() for total in totals.values()):
            raise ValueError("its means are complex numbers")
        self.totals = {name: total.to(self.device).double().reshape(()) * world.first for name, total in totals.items()}
        self.counts = {name: int(counts[name]) * world.first for name in totals}


def hits(logits: Tensor, target: Tensor) -> Tensor:
    """Count the images whose class is the first, and among the first five (or all), of the logits: (2,) float64."""
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
    """Say a result in one line; top-5 says something of more than five classes only."""
    said = []
    for number in (1, 5) if num_classes > 5 else (1,):
        top = result[f"valid_top{number}"]
        said.append(f"top-{number} {top:.2f}" + (f" (Err@{number} {100 - top:.2f})" if errors else ""))
    return "  ".join([*said, f"valid loss {result['valid_loss']:.4f}"])


def tag_of(name: str) -> str:
    """Return the TensorBoard tag of a metric: its name behind that of its group."""
    group = next((group for pattern, group in GROUPS.items() if re.fullmatch(pattern, name)), "run")
    return f"{group}/{name}"


class Journal:
    """The run folder's `metrics.jsonl` and TensorBoard events, written by rank 0.

    Args:
        folder: the run folder.
        start: first epoch that will be written; lines from there on, left by a run cut short, are dropped.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            # The last line may be cut; complete ones stand before it.
            lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in lines if _epoch(self.path, line) < start]
            beside = self.path.with_name("metrics.jsonl.new")
            beside.write_text("".join(kept))
            beside.replace(self.path)
        from tensorboardX import SummaryWriter  # not needed before a run writes

        self.events = SummaryWriter(str(folder), purge_step=start or None)

    def write(self, record: dict[str, Any]) -> None:
        """Add one epoch."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            for name, value in record.items():
                if name != "epoch" and isinstance(value, (int, float)):
                    self.events.add_scalar(tag_of(name), value, record["epoch"])
            self._add_flow(record["epoch"])
            self.events.flush()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}): make room; --resume resumes from last.pth"
            ) from error

    def _add_flow(self, epoch: int) -> None:
        """Add the pictures of the matching that was made before this epoch, if one was."""
        newest = matchings.files(self.path.parent)[-1:]
        with contextlib.suppress(ValueError):  # a report names a file that is damaged
            for path in newest:
                matching = matchings.read_matching(path)
                for stage in matching.stages if matching.epoch == epoch else ():
                    if stage.cost is not None:
                        picture = matchings.closeness(matchings.ordered(stage, *PICTURE))
                        self.events.add_image(f"flow/{stage.name.replace(' ', '_')}", picture[None], epoch)

    def close(self) -> None:
        """Close the event file."""
        self.events.close()


def _epoch(path: Path, line: str) -> int:
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged: {shown(line)} is no record of an epoch; remove the line") from error
