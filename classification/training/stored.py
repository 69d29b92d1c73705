"""Train from a teacher's stored outputs: open them, and compare them with the run before it starts."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from classification.data.image_files import file_digest
from classification.data.stored import StoredViews, open_stored
from classification.errors import UserError
from classification.models.trained import networks_digest, open_trained
from classification.options.stored_teacher import VIEWS, StoredPlan
from classification.options.teachers import split_files
from classification.paths import relative
from classification.training.job import Job
from mgd import Outputs, Probe, spread_rest

READ = 64  # approximate number of images whose files are compared with those that were stored


def open_for(job: Job) -> StoredViews:
    """Read the folder of --teacher-cache, and compare it with the run.

    Raises:
        UserError: the teacher, the classes or the images differ, or versions whose random views may differ.
    """
    folder, root = job.options.networks.teacher_cache, job.options.data.data
    assert folder and root
    stored = open_stored(folder)
    plan = stored.plan
    _compare_classes(plan, folder, job)
    _compare_versions(plan, folder)
    if job.options.networks.teacher_resume and not job.resume_from:
        _compare_teacher(plan, folder, job)
    names = _names(job, root, stored.numbers)
    views = StoredViews(stored, names)
    for position in range(0, len(names), max(1, len(names) // READ)):
        path = job.data.train[position][0]
        if file_digest(path) != stored.block.hashes[int(views.stored_number[position])]:
            raise UserError(
                f"{path} has changed since it was stored in --teacher-cache {folder}: store the teacher again"
            )
    description = f"{plan.samples} views per image of {plan.views.img_size} px, crop {plan.views.train_crop}"
    job.notes.append(
        f"teacher: stored outputs of {', '.join(plan.archs)} in {folder}, {description}, top {plan.top} classes"
    )
    return views


def _names(job: Job, root: str, numbers: Container[str]) -> list[str]:
    """Return the path of every training image in the stored folder: relative to the data folder, or to --pile-root."""
    names, pile = [], job.options.pile
    for path, _ in job.data.train:
        name = relative(path, root)
        if pile.pile_list and name not in numbers:
            name_in_pile = relative(path, pile.pile_root)
            name = name_in_pile if name_in_pile in numbers or name.startswith("..") else name
        names.append(name)
    return names


def _compare_classes(plan: StoredPlan, folder: str, job: Job) -> None:
    if plan.num_classes != job.num_classes:
        raise UserError(
            f"--teacher-cache {folder} is from a teacher with {plan.num_classes} classes, but this run has "
            f"{job.num_classes}: store a teacher of these classes"
        )
    for index, (their, own) in enumerate(zip(plan.classes or job.data.classes, job.data.classes, strict=False)):
        if their != own:
            raise UserError(
                f"--teacher-cache {folder} is from a teacher of other classes: its class {index} is {their!r}, but "
                f"{own!r} in the data: store a teacher of these classes"
            )


def _compare_versions(plan: StoredPlan, folder: str) -> None:
    now = {"views": str(VIEWS)}
    if plan.views.changes_colours:  # they use the random functions of torch and torchvision
        now |= {name: version(name) for name in ("torch", "torchvision")}
    for name, value in now.items():
        if plan.versions.get(name) != value:
            raise UserError(
                f"--teacher-cache {folder} was stored with {name} {plan.versions.get(name)}, but this is {value}, "
                "which may draw other views: install that version, or store the teacher again"
            )


def _compare_teacher(plan: StoredPlan, folder: str, job: Job) -> None:
    options = job.options.networks
    archs = options.teacher_arch.split(",") if options.teacher_arch else []
    files = split_files(options.teacher_resume or "", len(archs))
    names = archs if len(archs) == len(files) else [None] * len(files)
    networks = [open_trained(Path(file), arch) for file, arch in zip(files, names, strict=True)]
    if networks_digest(networks) != plan.teacher:
        raise UserError(
            f"--teacher-cache {folder} holds another teacher ({', '.join(plan.archs)}) than {options.teacher_resume}: "
            "leave --teacher-resume out, or store this teacher with mgd reinforce"
        )


def stored_probe(job: Job) -> Probe:
    """Return the probe of a teacher whose outputs are stored; it has no maps."""
    assert job.stored is not None
    rows = job.stored.classifier
    classifier = None if rows is None else torch.from_numpy(rows).float()
    return Probe(Outputs(torch.zeros(1, job.num_classes)), classifier=classifier)


@dataclass(frozen=True)
class Given:
    """The stored teacher outputs of a batch, on the device; see `StoredViews.__call__`.

    Args:
        other: (B,) class of each image's partner.
        share: (B,) share of the image itself.
        classes: (B, k) likeliest classes of the teacher.
        log_probabilities: (B, k) of these classes.
        rest: (B,) log of the total probability of all other classes.
    """

    other: Tensor
    share: Tensor
    classes: Tensor
    log_probabilities: Tensor
    rest: Tensor

    def outputs(self, num_classes: int) -> list[Outputs]:
        """Return the teacher's outputs."""
        return [Outputs(spread_rest(self.classes, self.log_probabilities, self.rest, num_classes))]

    def mix(self, target: Tensor, num_classes: int) -> Tensor:
        """Return (B, K): share * the class of the image + (1 - share) * the class of its partner."""
        own, other = (F.one_hot(labels, num_classes).float() for labels in (target, self.other))
        share = self.share.float()[:, None]
        return share * own + (1 - share) * other
