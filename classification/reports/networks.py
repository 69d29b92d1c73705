"""The networks of a report: what evaluation.json says of them, or what they say of the user's images."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from classification.data.loading import subset
from classification.data.trial import Trial, read_trial
from classification.errors import RunError, UserError
from classification.models.trained import Trained, open_trained
from classification.options.devices import Devices
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
        root: the data folder.
        classes: names in order of index.
        paths: of the images.
        networks: with their predictions.
        note: which images they are.
        faults: networks that could not be tried, and why.
    """

    root: Path = Path()
    classes: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    networks: list[Network] = field(default_factory=list)
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
    tried, trials, causes = Tried(root=root), _Trials(root, most), []
    where = device_of(Devices())
    for source in tqdm(_sources(members, tried.faults), desc="networks", leave=False, disable=None):
        try:
            trained = open_network(source.file, source.spec)
            if source.spec and tried.networks and trained.num_classes != len(tried.classes):
                continue  # a teacher of other classes, whose maps alone guided the student
            trial = trials.of(trained)
        except UserError as error:
            causes.append(str(error))
            tried.faults.append(f"{source.name} was not tried on the images: {error}")
            continue
        tried.classes, tried.paths, tried.note = trial.data.classes, [path for path, _ in trial.data.valid], trial.said
        predictions = _predict(trained, trial, where)
        tried.networks.append(_scored(source, trained, predictions, tried))
    if not tried.networks:
        raise UserError(f"--data {root}: {causes[0] if causes else 'no run has a checkpoint to try on its images'}")
    return tried


def open_network(file: Path, spec: Mapping[str, Any]) -> Trained:
    """Open a checkpoint; the description of a teacher may name its network, and what it sees.

    Raises:
        UserError: a file that cannot be read, or a description that makes no sense.
    """
    arch = spec.get("arch")
    trained = open_trained(file, arch if isinstance(arch, str) else None)
    try:
        seen = trained.preprocessing.with_values({k: spec[k] for k in ("img_size", "mean", "std") if k in spec})
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    return replace(trained, preprocessing=seen)


class _Trials:
    """The images to try networks on; the folder is listed once for networks of the same classes."""

    def __init__(self, root: Path, most: int) -> None:
        self.root, self.most = root, most
        self._known: dict[tuple[tuple[str, ...] | None, int], Trial] = {}

    def of(self, trained: Trained) -> Trial:
        """Return them as a network sees them.

        Raises:
            UserError: there are none, or they are of other classes.
        """
        key = (None if trained.classes is None else tuple(trained.classes), trained.num_classes)
        if key not in self._known:
            seen = trained.preprocessing
            self._known[key] = self._drawn(
                read_trial(self.root, seen, trained.classes, trained.num_classes, calibrate=False)
            )
        return replace(self._known[key], preprocessing=trained.preprocessing)

    def _drawn(self, trial: Trial) -> Trial:
        every = trial.data.valid
        if any(target < 0 for _, target in every):
            raise UserError("it has no valid/, so the classes of its images are unknown: expected valid/CLASS/")
        valid = [every[index] for index in subset(len(every), self.most, seed=0, epoch=0)]
        number = f"all {len(valid)}" if len(valid) == len(every) else f"{len(valid)} of the {len(every)}"
        said = f"{number} validation images of {self.root}"
        return replace(trial, data=replace(trial.data, valid=valid), said=said)


@dataclass(frozen=True)
class _Source:
    """Where a network of a report comes from: a run, or the description of a teacher, which is empty otherwise."""

    name: str
    role: str
    group: str
    colour: str
    file: Path
    spec: Mapping[str, Any]


def _sources(members: Sequence[Member], faults: list[str]) -> list[_Source]:
    """Return the networks of the runs and then their teachers, each once."""
    found: dict[Path, _Source] = {}
    for member in members:
        file = checkpoint(member.run)
        if file is not None:
            found[file.resolve()] = _Source(member.run.name, member.role, member.group, member.colour, file, {})
    for member in members:
        for spec, path in teacher_files(member.run):
            name = f"teacher {spec.get('arch', 'unknown')}"
            if path is None or not is_file(path):
                why = "it has no file" if path is None else f"{path} is missing"
                faults.append(f"{name} of {member.run.name} was not tried on the images: {why}")
            else:
                found.setdefault(path.resolve(), _Source(name, "teacher", name, TEACHER, path, spec))
    return list(found.values())


def checkpoint(run: Run) -> Path | None:
    """Return the checkpoint that stands for a run: best.pth, or else last.pth."""
    return next((run.folder / name for name in ("best.pth", "last.pth") if is_file(run.folder / name)), None)


@torch.inference_mode()
def _predict(trained: Trained, trial: Trial, where: torch.device) -> Predictions:
    network, parts = trained.network.to(where), [torch.empty(0, COLUMNS, dtype=torch.float64)]
    for pixels, target in trial.batches(BATCH):
        try:
            logits = logits_of(network(trained.preprocessing.normalise(pixels.to(where)).contiguous()))
        except torch.OutOfMemoryError as error:
            raise RunError(f"{trained.path}: a batch of {BATCH} images needs too much memory") from error
        parts.append(per_image(logits.float().cpu(), target))
    return Predictions.of(torch.cat(parts))


def _scored(source: _Source, trained: Trained, predictions: Predictions, tried: Tried) -> Network:
    tensors = (*trained.network.parameters(), *trained.network.buffers())
    return Network(
        source.name,
        source.role,
        source.group,
        source.colour,
        trained.arch,
        source=f"images of {tried.root}",
        parameters=sum(value.numel() for value in trained.network.parameters()),
        megabytes=sum(value.nbytes for value in tensors) / 1e6,
        scores=scores(predictions, tried.classes),
        predictions=predictions,
    )
