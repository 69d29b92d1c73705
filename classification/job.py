"""A job: data, networks and distiller of one run, built and checked before any rank starts."""

from __future__ import annotations

import warnings
from argparse import Namespace
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from classification.checkpoint import fingerprints, image_names, read_resume, run_folder
from classification.config import total_epochs
from classification.data import Folder, read_folder, without_unreadable
from classification.errors import UserError
from classification.launch import device_of
from classification.models import build
from classification.models.weights import load_file, load_pretrained, load_strictly
from classification.paths import exists
from classification.precision import widen
from classification.restore import check_flows, damaged, take_up
from mgd import ChannelMatching, Distiller, Mutual, matchings


@dataclass
class Job:
    """Everything that `Engine` needs; all of it on the CPU.

    Args:
        args: the checked options.
        data: the folder's splits.
        student: the network to train or evaluate; None where only a teacher is evaluated.
        teachers: the networks beside it: frozen, or in mutual learning its peers.
        distiller: what computes the loss, or None with --evaluate.
        notes: what was loaded, one line each.
        resume: the checkpoint to go on from, or None.
        changed: how its run differs from this one, where --resume-override allows it.
        anew: what begins anew therefore: its state does not fit.
        inputs: hashes of what the run depends on beside its options.
        bad: images that were left out, and why.
        auto: whether --resume auto was given, with which a run that is done is no mistake.
        done: whether the checkpoint is of a run that is done.
        starts: matchings, one a teacher, that are solved once, for the terms that begin with a flow.
        sizes: parameters of each network, by role: "student", "teacher", or "teacher 1" and so on.
    """

    args: Namespace
    data: Folder
    student: nn.Module | None
    teachers: list[nn.Module]
    distiller: Distiller | Mutual | None = None
    notes: list[str] = field(default_factory=list)
    starts: list[ChannelMatching] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    resume: dict[str, Any] | None = None
    changed: list[str] = field(default_factory=list)
    anew: list[str] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    auto: bool = False
    done: bool = False
    folder: Path = Path()

    def networks(self) -> dict[str, tuple[str, nn.Module]]:
        """Return {role: (arch, network)}, teachers first."""
        mutual = "dml" in getattr(self.args, "terms", {})
        name = "peer" if mutual else "teacher"
        found = {}
        for number, (spec, network) in enumerate(zip(self.args.teachers, self.teachers, strict=False), start=1):
            found[name if len(self.teachers) == 1 else f"{name} {number}"] = (spec["arch"], network)
        return found if self.student is None else {**found, "student": (self.args.arch, self.student)}

    def set_distiller(self, distiller: Distiller | Mutual) -> None:
        """Take the distiller, and the checkpoint to go on from if there is one."""
        args = self.args
        self.distiller = distiller
        self.folder = run_folder(args, f"{args.arch.replace(':', '-')}-{'+'.join(args.terms)}")
        frozen = [] if isinstance(distiller, Mutual) else self.teachers
        self.inputs = fingerprints(frozen, self.data.train, args.data, distiller.terms)
        if not args.resume:
            return
        images = image_names(self.data.train, args.data)
        self.resume, self.changed = read_resume(args.resume, args, self.data.classes, self.inputs, images)
        if self.changed:
            self.notes.append(f"going on with {', and '.join(self.changed)}")
        self.done = self.resume["resume"]["epoch"] >= total_epochs(args)
        if self.done and not self.auto:
            raise UserError(f"{args.resume} is of a run that is done: raise --epochs to go on")
        self._load_resume(self.resume, distiller)

    def _load_resume(self, resume: dict[str, Any], distiller: Distiller | Mutual) -> None:
        """Take up the student and the terms; a term of changed options, which its state does not fit, begins anew."""
        assert self.student is not None
        source = f"{self.args.resume} is damaged: it"
        load_strictly(self.student, resume["state_dict"], source, self.args.arch)
        for name, term in distiller.terms.items():
            if error := take_up(term, partial(_load_term, term, resume["resume"]["terms"].get(name))):
                if not self.changed:
                    what = f"the state of the term {name} does not fit: {' '.join(str(error).split())[:200]}"
                    raise damaged(self.args.resume, what) from error
                self.anew.append(f"the term {name}")


def _load_term(term: nn.Module, state: dict[str, Any]) -> None:
    term.load_state_dict(state)
    for matching in matchings(term):
        check_flows(matching)


def start_job(args: Namespace, *, with_teacher: bool) -> Job:
    """Read the folder and build the networks that `args` asks for.

    Raises:
        UserError: whatever the user can mend.
    """
    warnings.filterwarnings("ignore", module="PIL")  # what it says of files names none of them
    data = read_folder(
        args.data,
        labels=bool(getattr(args, "labels", 1)),
        train_list=args.train_list,
        valid_list=args.valid_list,
        num_classes=args.num_classes,
    )
    bad: dict[str, str] = {}
    if args.bad_images == "skip":
        data, bad = without_unreadable(data, args.workers)
    if args.num_classes is None:
        args.num_classes = len(data.classes)
    if args.num_classes < len(data.classes):
        raise UserError(f"--num-classes {args.num_classes} is less than the {len(data.classes)} class folders")
    torch.manual_seed(args.seed)
    job = Job(args, data, None, [], auto=args.resume == "auto", bad=bad)
    if bad:
        job.notes.append(f"left out {len(bad)} images that cannot be read: {', '.join(list(bad)[:3])} ...")
    only_teacher = (
        args.evaluate
        and with_teacher
        and not (args.student_resume or args.resume or args.pretrained or args.use_pretrained)
    )
    if not only_teacher:
        job.student = _student(args, data, job.notes)
        _try(args, args.arch, job.student)
    if with_teacher:
        for spec in args.teachers:
            teacher = _teacher(args, spec, data, job.notes)
            if args.evaluate or not spec.get("frozen", True):
                teacher = _trainable(args, teacher)
            _try(args, spec["arch"], teacher, spec.get("img_size"))
            job.teachers.append(teacher)
    networks = job.networks()
    job.sizes = {role: sum(p.numel() for p in network.parameters()) for role, (_, network) in networks.items()}
    return job


@torch.no_grad()
def _try(args: Namespace, arch: str, model: nn.Module, size: int | None = None) -> None:
    """Refuse a network that does not turn an image of --img-size into --num-classes logits."""
    model.eval()
    size = size or args.img_size
    try:
        logits = model(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        raise UserError(f"{arch} does not run at --img-size {size}: {' '.join(str(error).split())}") from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, args.num_classes):
        raise UserError(f"{arch} does not return {args.num_classes} logits an image: choose another network")


def _student(args: Namespace, data: Folder, notes: list[str]) -> nn.Module:
    model = _trainable(args, build(args.arch, args.num_classes))
    goes_on = bool(args.resume) and (args.resume != "auto" or exists(Path(args.output, "last.pth")))
    file = (args.resume if args.evaluate else "") or (args.student_resume if not goes_on else "")
    if file:
        notes.append(_load(args, model, file, args.arch, data, args.img_size, new_head=not args.evaluate))
    elif (args.pretrained or args.use_pretrained) and not goes_on:
        notes.append(load_pretrained(model, args.arch, option="--student-resume"))
    elif args.evaluate:
        raise UserError("--evaluate has no weights to evaluate: give a file by --student-resume, or --pretrained")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if args.sync_bn else model


def _trainable(args: Namespace, model: nn.Module) -> nn.Module:
    """Replace the layers whose gradient a processor is slow at in bfloat16, before anything is tapped."""
    if args.amp == "bf16" and device_of(args).type == "cpu":
        widen(model)
    return model


def _load(
    args: Namespace, model: nn.Module, file: str, arch: str, data: Folder, img_size: int, new_head: bool = False
) -> str:
    return load_file(
        model,
        file,
        arch=arch,
        num_classes=args.num_classes,
        classes=data.classes,
        img_size=img_size,
        new_head=new_head,
    )


def _teacher(args: Namespace, spec: dict[str, Any], data: Folder, notes: list[str]) -> nn.Module:
    arch, file = spec["arch"], spec.get("resume", "")
    model = build(arch, args.num_classes)
    if file:
        line = _load(args, model, file, arch, data, spec.get("img_size", args.img_size))
    elif not spec.get("frozen", True):
        return model
    elif args.num_classes == 1000:
        line = load_pretrained(model, arch, option="--teacher-resume", name=spec.get("weights"))
        normalised = getattr(model, "pretrained_cfg", {})  # timm's, which differ
        spec.update({key: list(normalised[key]) for key in ("mean", "std") if key in normalised and key not in spec})
    else:
        raise UserError(
            f"the published weights of {arch} have 1000 classes, this run {args.num_classes}: "
            "train a teacher with main_base.py and give its best.pth by --teacher-resume"
        )
    notes.append(line)
    return model
