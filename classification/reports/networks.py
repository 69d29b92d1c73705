"""The networks of a report: what evaluation.json says of them, or what they say of the user's images."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from classification.data.folders import subset
from classification.data.trial import Trial, read_trial
from classification.errors import RunError, UserError
from classification.models.trained import Trained, open_trained
from classification.options.groups import Devices
from classification.paths import is_file
from classification.reports.groups import TEACHER, Member, teacher_files
from classification.reports.records import Run, mapping
from classification.runs.scores import COLUMNS, Predictions, per_image, scores
from classification.runs.world import device_of
from mgd import logits_of

BATCH = 64


@dataclass(frozen=True)
class Network:
    """A network of a report.

    Args:
        name: that of its run, or "teacher ARCH".
        role: as of its run, see `Member`.
        group: likewise.
        colour: as CSS.
        arch: its architecture.
        source: where its scores come from, in words.
        parameters: their number, or None where it is not known.
        megabytes: of parameters and buffers, likewise.
        scores: as in evaluation.json; maybe "top1" alone.
        predictions: per image of --data, or None.
    """

    name: str
    role: str
    group: str
    colour: str
    arch: str
    source: str
    parameters: int | None
    megabytes: float | None
    scores: Mapping[str, Any]
    predictions: Predictions | None = None

    @property
    def top1(self) -> float | None:
        """Top-1 in percent."""
        return number(self.scores.get("top1"))

    @property
    def latency(self) -> dict[int, float]:
        """Milliseconds by images of a batch, where they were measured."""
        entries = mapping(self.scores.get("latency_ms"))
        found = {int(size): number(value) for size, value in entries.items() if str(size).isdigit()}
        return {size: value for size, value in found.items() if value is not None}

    def with_latency(self, milliseconds: Mapping[str, float]) -> Network:
        """Return the same network with latencies that were measured elsewhere."""
        return replace(self, scores={**self.scores, "latency_ms": milliseconds})

    @property
    def per_class(self) -> dict[str, tuple[int, int]]:
        """Images and correct ones by class."""
        entries = self.scores.get("per_class")
        found = {}
        for entry in map(mapping, entries if isinstance(entries, list) else ()):
            images, correct = entry.get("images"), entry.get("correct")
            if isinstance(images, int) and isinstance(correct, int):
                found[str(entry.get("name"))] = (images, correct)
        return found


def number(value: object) -> float | None:
    """Return a finite number as a float, and None in the place of anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def known_networks(members: Sequence[Member]) -> list[Network]:
    """Return what the run folders say of their networks, without running any."""
    found = [_of_run(member) for member in members]
    archs = {network.arch for network in found if network.role == "teacher"}
    for member in members:
        for role, entry in member.run.evaluation.items():
            arch = str(entry.get("arch", "unknown"))
            if role.startswith("teacher") and arch not in archs:
                archs.add(arch)
                found.append(_evaluated(f"teacher {arch}", "teacher", f"teacher {arch}", TEACHER, entry))
    return found


def _of_run(member: Member) -> Network:
    run = member.run
    if mapping(run.evaluation.get("student")):
        return _evaluated(run.name, member.role, member.group, member.colour, run.evaluation["student"])
    top1, source = run.last("valid_top1"), "last epoch"
    known = {} if top1 is None else {"top1": top1}
    own = (run.name, member.role, member.group, member.colour, run.arch)
    return Network(*own, source, run.parameters, run.megabytes, known)


def _evaluated(name: str, role: str, group: str, colour: str, entry: Mapping[str, Any]) -> Network:
    parameters = number(entry.get("parameters"))
    count = None if parameters is None else int(parameters)
    arch, megabytes = str(entry.get("arch", "unknown")), number(entry.get("megabytes"))
    return Network(name, role, group, colour, arch, "evaluation.json", count, megabytes, entry)


@dataclass
class Tried:
    """The networks of a report on images of --data.

    Args:
        classes: names in order of index.
        root: the data folder.
        paths: of the images.
        networks: with their predictions.
        opened: the networks themselves, by name.
        note: which images they are.
        faults: networks that could not be tried, and why.
    """

    classes: list[str] = field(default_factory=list)
    root: Path = Path()
    paths: list[str] = field(default_factory=list)
    networks: list[Network] = field(default_factory=list)
    opened: dict[str, Trained] = field(default_factory=dict)
    note: str = ""
    faults: list[str] = field(default_factory=list)

    def short(self, path: str) -> str:
        """Return the path of an image as seen from the data folder."""
        return os.path.relpath(path, self.root)


def try_networks(members: Sequence[Member], root: Path, most: int) -> Tried:
    """Run the networks of all runs, and their teachers, on the validation images of a data folder.

    Args:
        members: the runs.
        root: the data folder.
        most: images at most; of more, some are drawn, the same for all networks.

    Raises:
        UserError: no such images, or none of the networks is of their classes.
    """
    tried = Tried(root=root)
    jobs, causes = [], []
    for name, role, group, colour, file, spec in _found(members, tried.faults):
        try:
            trained = open_trained(file, spec.get("arch") if role == "teacher" else None)
            seen = trained.preprocessing.with_values({k: spec[k] for k in ("img_size", "mean", "std") if k in spec})
            trained = replace(trained, preprocessing=seen)
            trial = read_trial(root, seen, trained.classes, trained.num_classes, calibrate=False)
        except (UserError, ValueError) as error:
            causes.append(str(error))
            tried.faults.append(f"{name} was not tried on the images: {error}")
        else:
            network = Network(name, role, group, colour, trained.arch, f"images of {root}", None, None, {})
            jobs.append((network, trained, trial))
    if not jobs:
        raise UserError(f"--data {root}: {causes[0] if causes else 'no run has a checkpoint to try on its images'}")
    first = jobs[0][2]
    if any(target < 0 for _, target in first.data.valid):
        raise UserError(
            f"--data {root} has no valid/, so the classes of its images are not known: expected valid/CLASS/"
        )
    chosen = subset(len(first.data.valid), most, seed=0, epoch=0)
    valid = [first.data.valid[index] for index in chosen]
    tried.classes, tried.paths = first.data.classes, [path for path, _ in valid]
    all_of = (
        f"{len(valid)} of the {len(first.data.valid)}" if len(valid) < len(first.data.valid) else f"all {len(valid)}"
    )
    tried.note = f"{all_of} validation images of {root}"
    where = device_of(Devices())
    with tqdm(total=len(jobs) * len(valid), desc="images", leave=False, disable=None) as bar:
        for network, trained, trial in jobs:
            own = replace(trial, data=replace(trial.data, valid=valid))
            predictions = _predict(trained, own, where, bar)
            tried.networks.append(_scored(network, trained.network, predictions, tried.classes))
            tried.opened[network.name] = trained
    return tried


def _found(
    members: Sequence[Member], faults: list[str]
) -> Iterator[tuple[str, str, str, str, Path, Mapping[str, Any]]]:
    """Yield name, role, group, colour, file and description of every network, each once."""
    known = set()
    for member in members:
        file = checkpoint(member.run)
        if file is not None:
            known.add(file.resolve())
            yield member.run.name, member.role, member.group, member.colour, file, {}
    for member in members:
        for spec, path in teacher_files(member.run):
            arch = str(spec.get("arch", "unknown"))
            if path is None:
                faults.append(f"teacher {arch} of {member.run.name} was not tried on the images: it has no file")
            elif not is_file(path):
                faults.append(f"teacher {arch} of {member.run.name} was not tried on the images: {path} is missing")
            elif path.resolve() not in known:
                known.add(path.resolve())
                yield f"teacher {arch}", "teacher", f"teacher {arch}", TEACHER, path, spec


def checkpoint(run: Run) -> Path | None:
    """Return the checkpoint that stands for a run: best.pth, or else last.pth."""
    return next((run.folder / name for name in ("best.pth", "last.pth") if is_file(run.folder / name)), None)


@torch.inference_mode()
def _predict(trained: Trained, trial: Trial, where: torch.device, bar: Any) -> Predictions:
    network, parts = trained.network.to(where), [torch.empty(0, COLUMNS, dtype=torch.float64)]
    for pixels, target in trial.batches(BATCH):
        try:
            logits = logits_of(network(trained.preprocessing.normalise(pixels.to(where)).contiguous()))
        except torch.OutOfMemoryError as error:
            raise RunError(f"{trained.path}: a batch of {BATCH} images needs too much memory") from error
        parts.append(per_image(logits.float().cpu(), target))
        bar.update(len(pixels))
    network.to("cpu")
    return Predictions.of(torch.cat(parts))


def _scored(network: Network, model: nn.Module, predictions: Predictions, classes: Sequence[str]) -> Network:
    tensors = (*model.parameters(), *model.buffers())
    return replace(
        network,
        parameters=sum(value.numel() for value in model.parameters()),
        megabytes=sum(value.nbytes for value in tensors) / 1e6,
        scores=scores(predictions, classes),
        predictions=predictions,
    )
