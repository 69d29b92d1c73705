"""The networks of a report: their recorded scores, or their predictions on the user's images."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from classification.data.loading import draw_subset
from classification.data.trial import Trial, read_trial
from classification.errors import RunError, UserError
from classification.models.cost import count_parameters
from classification.models.trained import Trained, open_trained
from classification.options.devices import Devices
from classification.paths import is_file
from classification.reports.groups import TEACHER, Member, teacher_files
from classification.reports.records import Run, as_mapping
from classification.runs.scores import COLUMNS, Predictions, per_image, scores
from classification.runs.world import device_of
from mgd import logits_of

BATCH = 64


@dataclass(frozen=True)
class Network:
    """A network of a report.

    Args:
        name: name of its run, or "teacher ARCH".
        role: see `Member`.
        group: see `Member`.
        colour: as CSS.
        arch: its architecture.
        source: where its scores are from, in words.
        parameters: number of parameters, or None if unknown.
        megabytes: of parameters and buffers, or None if unknown.
        scores: as in evaluation.json; perhaps only "top1".
        predictions: for the images of --data, or None.
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
        return finite_number(self.scores.get("top1"))

    @property
    def latency(self) -> dict[int, float]:
        """The measured milliseconds, by batch size."""
        entries = as_mapping(self.scores.get("latency_ms"))
        latencies = {int(size): finite_number(value) for size, value in entries.items() if str(size).isdecimal()}
        return {size: value for size, value in latencies.items() if value is not None}

    def with_latency(self, milliseconds: Mapping[str, float]) -> Network:
        """Return the network with other latencies."""
        return replace(self, scores={**self.scores, "latency_ms": milliseconds})

    @property
    def per_class(self) -> dict[str, tuple[int, int]]:
        """(number of images, number of correct ones) by class."""
        entries = self.scores.get("per_class")
        counts = {}
        for entry in map(as_mapping, entries if isinstance(entries, list) else ()):
            images, correct = entry.get("images"), entry.get("correct")
            if isinstance(images, int) and isinstance(correct, int):
                counts[str(entry.get("name"))] = (images, correct)
        return counts


def finite_number(value: object) -> float | None:
    """Return a finite number as a float, and None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def recorded_networks(members: Sequence[Member]) -> list[Network]:
    """Return the networks as the run folders describe them, without running them."""
    networks = [_recorded_network(member) for member in members]
    archs = {network.arch for network in networks if network.role == "teacher"}
    for member in members:
        for role, entry in member.run.evaluation.items():
            arch = str(entry.get("arch", "unknown"))
            if role.startswith("teacher") and arch not in archs:
                archs.add(arch)
                networks.append(_evaluated_network(f"teacher {arch}", "teacher", f"teacher {arch}", TEACHER, entry))
    return networks


def _recorded_network(member: Member) -> Network:
    run = member.run
    if as_mapping(run.evaluation.get("student")):
        return _evaluated_network(run.name, member.role, member.group, member.colour, run.evaluation["student"])
    top1, source = run.last("valid_top1"), "last epoch"
    scores = {} if top1 is None else {"top1": top1}
    identity = (run.name, member.role, member.group, member.colour, run.arch)
    return Network(*identity, source, run.parameters, run.megabytes, scores)


def _evaluated_network(name: str, role: str, group: str, colour: str, entry: Mapping[str, Any]) -> Network:
    parameters = finite_number(entry.get("parameters"))
    num_parameters = None if parameters is None else int(parameters)
    arch, megabytes = str(entry.get("arch", "unknown")), finite_number(entry.get("megabytes"))
    return Network(name, role, group, colour, arch, "evaluation.json", num_parameters, megabytes, entry)


@dataclass
class NetworkResults:
    """The results of a report's networks on images of --data.

    Args:
        root: the data folder.
        classes: class names in order of index.
        paths: of the images.
        networks: with their predictions.
        note: which images they are, in words.
        faults: which networks could not be run, and why.
    """

    root: Path = Path()
    classes: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    networks: list[Network] = field(default_factory=list)
    note: str = ""
    faults: list[str] = field(default_factory=list)

    def short(self, path: str) -> str:
        """Return the path of an image relative to the data folder."""
        return os.path.relpath(path, self.root)


def run_networks(members: Sequence[Member], root: Path, max_images: int) -> NetworkResults:
    """Run the networks of all runs, and their teachers, on the validation images of a data folder.

    Args:
        members: the runs.
        root: the data folder.
        max_images: largest number of images; if there are more, the same random ones are used for all networks.

    Raises:
        UserError: there are no such images, or no network has their classes.
    """
    results, trials, causes = NetworkResults(root=root), _Trials(root, max_images), []
    device = device_of(Devices())
    for source in tqdm(_sources(members, results.faults), desc="networks", leave=False, disable=None):
        try:
            trained = open_network(source.file, source.spec)
            if source.spec and results.networks and trained.num_classes != len(results.classes):
                continue  # a teacher of other classes, whose maps alone guided the student
            trial = trials.of(trained)
        except UserError as error:
            causes.append(str(error))
            results.faults.append(f"{source.name} was not tried on the images: {error}")
            continue
        results.classes, results.paths, results.note = (
            trial.data.classes,
            [path for path, _ in trial.data.valid],
            trial.description,
        )
        predictions = _predict(trained, trial, device)
        results.networks.append(_scored_network(source, trained, predictions, results))
    if not results.networks:
        raise UserError(f"--data {root}: {causes[0] if causes else 'no run has a checkpoint to try on its images'}")
    return results


def open_network(file: Path, spec: Mapping[str, Any]) -> Trained:
    """Open a checkpoint; the description of a teacher may name its architecture and preprocessing.

    Raises:
        UserError: the file cannot be read, or the description is damaged.
    """
    arch = spec.get("arch")
    trained = open_trained(file, arch if isinstance(arch, str) else None)
    try:
        preprocessing = trained.preprocessing.with_values(
            {k: spec[k] for k in ("img_size", "mean", "std") if k in spec}
        )
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    return replace(trained, preprocessing=preprocessing)


class _Trials:
    """The images to run networks on; the folder is listed once for all networks with the same classes."""

    def __init__(self, root: Path, max_images: int) -> None:
        self.root, self.max_images = root, max_images
        self._trials: dict[tuple[tuple[str, ...] | None, int], Trial] = {}

    def of(self, trained: Trained) -> Trial:
        """Return the images with the preprocessing of a network.

        Raises:
            UserError: there are no images, or they are of other classes.
        """
        key = (None if trained.classes is None else tuple(trained.classes), trained.num_classes)
        if key not in self._trials:
            preprocessing = trained.preprocessing
            self._trials[key] = self._draw(
                read_trial(self.root, preprocessing, trained.classes, trained.num_classes, calibrate=False)
            )
        return replace(self._trials[key], preprocessing=trained.preprocessing)

    def _draw(self, trial: Trial) -> Trial:
        samples = trial.data.valid
        if any(target < 0 for _, target in samples):
            raise UserError("it has no valid/, so the classes of its images are unknown: expected valid/CLASS/")
        valid = [samples[index] for index in draw_subset(len(samples), self.max_images, seed=0, epoch=0)]
        count = f"all {len(valid)}" if len(valid) == len(samples) else f"{len(valid)} of the {len(samples)}"
        description = f"{count} validation images of {self.root}"
        return replace(trial, data=replace(trial.data, valid=valid), description=description)


@dataclass(frozen=True)
class _Source:
    """The checkpoint of a report's network; `spec` is the description of a teacher, empty for the network of a run."""

    name: str
    role: str
    group: str
    colour: str
    file: Path
    spec: Mapping[str, Any]


def _sources(members: Sequence[Member], faults: list[str]) -> list[_Source]:
    """Return the networks of the runs, then their teachers, each once; add those without a file to `faults`."""
    sources: dict[Path, _Source] = {}
    for member in members:
        file = find_checkpoint(member.run)
        if file is not None:
            sources[file.resolve()] = _Source(member.run.name, member.role, member.group, member.colour, file, {})
    for member in members:
        for spec, path in teacher_files(member.run):
            name = f"teacher {spec.get('arch', 'unknown')}"
            if path is None or not is_file(path):
                why = "it has no file" if path is None else f"{path} is missing"
                faults.append(f"{name} of {member.run.name} was not tried on the images: {why}")
            else:
                sources.setdefault(path.resolve(), _Source(name, "teacher", name, TEACHER, path, spec))
    return list(sources.values())


def find_checkpoint(run: Run) -> Path | None:
    """Return the checkpoint of a run: best.pth, or else last.pth, or None."""
    return next((run.folder / name for name in ("best.pth", "last.pth") if is_file(run.folder / name)), None)


@torch.inference_mode()
def _predict(trained: Trained, trial: Trial, device: torch.device) -> Predictions:
    network, rows = trained.network.to(device), [torch.empty(0, COLUMNS, dtype=torch.float64)]
    for pixels, target in trial.batches(BATCH):
        try:
            logits = logits_of(network(trained.preprocessing.normalise(pixels.to(device)).contiguous()))
        except torch.OutOfMemoryError as error:
            raise RunError(f"{trained.path}: a batch of {BATCH} images needs too much memory") from error
        rows.append(per_image(logits.float().cpu(), target))
    return Predictions.of(torch.cat(rows))


def _scored_network(source: _Source, trained: Trained, predictions: Predictions, results: NetworkResults) -> Network:
    sizes = count_parameters(trained.network)
    return Network(
        source.name,
        source.role,
        source.group,
        source.colour,
        trained.arch,
        source=f"images of {results.root}",
        parameters=int(sizes["parameters"]),
        megabytes=sizes["megabytes"],
        scores=scores(predictions, results.classes),
        predictions=predictions,
    )
