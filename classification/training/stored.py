"""A run that trains from a teacher's stored outputs: opened and compared with the run before it starts."""

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

READ = 64  # images whose files are compared with those that the teacher saw


def open_for(job: Job) -> StoredViews:
    """Read the folder of --teacher-cache, and compare it with the run.

    Raises:
        UserError: another teacher, other classes, other images, or views that this machine would draw in another way.
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
    found = StoredViews(stored, names)
    for position in range(0, len(names), max(1, len(names) // READ)):
        path = job.data.train[position][0]
        if file_digest(path) != stored.block.hashes[int(found.stored_number[position])]:
            raise UserError(
                f"{path} has changed since it was stored in --teacher-cache {folder}: store the teacher again"
            )
    views = f"{plan.samples} views per image of {plan.views.img_size} px, crop {plan.views.train_crop}"
    job.notes.append(f"teacher: stored outputs of {', '.join(plan.archs)} in {folder}, {views}, top {plan.top} classes")
    return found


def _names(job: Job, root: str, numbers: Container[str]) -> list[str]:
    """Return the path of every image as the folder knows it: relative to the data folder, or to --pile-root."""
    found, pile = [], job.options.pile
    for path, _ in job.data.train:
        name = relative(path, root)
        if pile.pile_list and name not in numbers:
            below = relative(path, pile.pile_root)
            name = below if below in numbers or name.startswith("..") else name
        found.append(name)
    return found


def _compare_classes(plan: StoredPlan, folder: str, job: Job) -> None:
    if plan.num_classes != job.num_classes:
        raise UserError(
            f"--teacher-cache {folder} is from a teacher with {plan.num_classes} classes, but this run has "
            f"{job.num_classes}: store a teacher of these classes"
        )
    for place, (their, own) in enumerate(zip(plan.classes or job.data.classes, job.data.classes, strict=False)):
        if their != own:
            raise UserError(
                f"--teacher-cache {folder} is from a teacher of other classes: its class {place} is {their!r}, but "
                f"{own!r} in the data: store a teacher of these classes"
            )


def _compare_versions(plan: StoredPlan, folder: str) -> None:
    now = {"views": str(VIEWS)}
    if plan.views.changes_colours:  # whose draws are torch's and torchvision's own
        now |= {name: version(name) for name in ("torch", "torchvision")}
    for name, value in now.items():
        if plan.versions.get(name) != value:
            raise UserError(
                f"--teacher-cache {folder} was stored with {name} {plan.versions.get(name)}, but this is {value}, "
                "which may draw other views: install that version, or store the teacher again"
            )


def _compare_teacher(plan: StoredPlan, folder: str, job: Job) -> None:
    networks = job.options.networks
    archs = networks.teacher_arch.split(",") if networks.teacher_arch else []
    files = split_files(networks.teacher_resume or "", len(archs))
    named = archs if len(archs) == len(files) else [None] * len(files)
    if (
        networks_digest([open_trained(Path(file), arch) for file, arch in zip(files, named, strict=True)])
        != plan.teacher
    ):
        raise UserError(
            f"--teacher-cache {folder} holds another teacher ({', '.join(plan.archs)}) than {networks.teacher_resume}: "
            "leave --teacher-resume out, or store this teacher with mgd reinforce"
        )


def stored_probe(job: Job) -> Probe:
    """Return what terms may know of a teacher whose outputs are stored."""
    assert job.stored is not None
    rows = job.stored.classifier
    classifier = None if rows is None else torch.from_numpy(rows).float()
    return Probe(Outputs(torch.zeros(1, job.num_classes)), classifier=classifier)


@dataclass(frozen=True)
class Given:
    """What the loader gives beside images, classes and positions, on the device.

    Args:
        other: (B,) class of each image's partner.
        share: (B,) part of the image itself.
        classes: (B, k), of the teacher.
        log_probabilities: (B, k).
        rest: (B,), log of the mass of the other classes.
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
