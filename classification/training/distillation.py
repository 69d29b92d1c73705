"""From checked options and loaded networks to a distiller: taps, terms, margins, fast teachers."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from classification.data.preprocessing import Preprocessing
from classification.errors import UserError
from classification.models import default_taps
from classification.options import config
from classification.options.terms import build_term, given, needing, needing_flows, pairing, schedule, using
from classification.runs import launch
from classification.training.job import Job
from mgd import (
    ChannelMatching,
    Distiller,
    Ensemble,
    Frozen,
    Mutual,
    Outputs,
    Taps,
    View,
    bn_margin,
    dry_forward,
    fold_norms,
    freeze,
    has_bfloat16,
    norms_before,
)
from mgd.distiller import Weight
from mgd.losses import LOSSES, EachTeacher


def distil(job: Job, student: Taps, *teachers: Taps) -> Distiller:
    """Build the terms and freeze the teachers, each in its fastest form."""
    args = job.args
    views = [view(job.preprocessing, seen) for seen in job.teacher_preprocessing]
    networks = zip((student, *teachers), (None, *views), strict=True)
    outputs = [dry(args, network, shown) for network, shown in networks]
    joint = args.teacher_mean == "probabilities"
    if joint:
        outputs = [outputs[0], Outputs(outputs[1].logits)]
    defaults = {"mgd": 1 / args.loss_factor if args.mgd_form == "sum" else args.mgd_weight, "kd": args.kd_weight}
    terms: dict[str, tuple[nn.Module, Weight]] = {}
    for name in args.terms:
        if name == "mgd":
            share = observe_share(args, len(job.data.train))
            matched = [match(args, student, *pair, share, job.notes) for pair in zip(teachers, views, strict=True)]
            weights = given(args, name).get("teacher_weights")
            term: nn.Module = matched[0] if len(matched) == 1 else EachTeacher(matched, weights)
        else:
            more: dict[str, Any] = {}
            if name == "ofd":
                more["margins"] = [bn_margins(args, *pair, job.notes) for pair in zip(teachers, views, strict=True)]
            term = build_term(args, name, outputs[0], outputs[1:], len(job.data.train), **more)
        default = defaults[name] if name in defaults else LOSSES[name].weight
        terms[name] = (term, schedule(args, name, default, config.total_epochs(args)))
    if needing_flows(args.terms) and "mgd" not in terms:
        job.starts = [match(args, student, *pair) for pair in zip(teachers, views, strict=True)]
    job.teachers = [speed_up(job, *pair) for pair in zip(teachers, views, strict=True)]
    weights = [float(teacher.get("weight", 1.0)) for teacher in args.teachers]
    return Distiller(student, freeze(Ensemble(job.teachers, weights)) if joint else job.teachers, terms)


def mutual(job: Job, networks: Sequence[Taps]) -> Mutual:
    """Build every network's own terms against its peers."""
    args = job.args
    outputs = [dry(args, network, None) for network in networks]
    terms: list[dict[str, tuple[nn.Module, Weight]]] = []
    for number in range(len(networks)):
        others = [output for position, output in enumerate(outputs) if position != number]
        terms.append({})
        for name in args.terms:
            term = build_term(args, name, outputs[number], others, len(job.data.train))
            weight = args.kd_weight if name == "kd" else LOSSES[name].weight
            terms[-1][name] = (term, schedule(args, name, weight, config.total_epochs(args)))
    return Mutual(networks, terms)


def view(student: Preprocessing, teacher: Preprocessing) -> View | None:
    """Return what a teacher of another size or normalisation needs between the student's images and itself."""
    if (student.mean, student.std, student.img_size) == (teacher.mean, teacher.std, teacher.img_size):
        return None
    return View(student.mean, student.std, teacher.mean, teacher.std, teacher.img_size)


def dry(args: Namespace, network: Taps, shown: View | None) -> Outputs:
    """Return the outputs of one dry forward.

    Raises:
        UserError: taps that are not reached, read what is no tensor, or do not say how it is laid out; no logits.
    """
    images = torch.zeros(1, 3, args.img_size, args.img_size)
    try:
        return dry_forward(network, images if shown is None else shown(images))
    except (ValueError, TypeError) as error:  # of the taps: what they read says that the network runs
        raise UserError(str(error)) from error
    except RuntimeError as error:
        raise UserError(f"the networks do not run at --img-size {args.img_size} with these taps: {error}") from error


def speed_up(job: Job, teacher: Taps, shown: View | None) -> Frozen:
    """Freeze a teacher in its fastest form: norms folded, in bfloat16 where the device has it."""
    args, size = job.args, job.args.img_size
    images = torch.randn(1, 3, size, size)
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in teacher.modules())
    folded = fold_norms(teacher, images if shown is None else shown(images))
    if args.teacher_dtype == "auto":
        narrow = "float16" if args.amp == "fp16" else "float32"
        args.teacher_dtype = "bfloat16" if has_bfloat16(launch.device_of(args)) else narrow
    job.notes.append(f"teacher: frozen, {folded} of {norms} batch norms folded into convolutions, {args.teacher_dtype}")
    return freeze(teacher.to(getattr(torch, args.teacher_dtype)), shown)


def tap(args: Namespace, student: nn.Module, teachers: Sequence[nn.Module]) -> list[Taps]:
    """Tap the student and its teachers where a term reads maps: at the paths given, or those of their families.

    Raises:
        UserError: no taps known, unknown paths, or another number of them.
    """
    networks = [student, *teachers]
    archs = [args.arch, *(spec["arch"] for spec in args.teachers)]
    lists = args.teacher_taps.split(";") if args.teacher_taps else [None]
    named = [args.student_taps, *(lists * len(teachers) if len(lists) == 1 else lists)]
    if len(named) != len(networks):
        raise UserError(f"--teacher-taps names paths of {len(named) - 1} teachers, there are {len(teachers)}")
    unknown = [not given and default_taps(*pair) is None for given, *pair in zip(named, archs, networks, strict=True)]
    wanted = needing(args.terms, "maps") or (any(named) and using(args.terms, "maps"))
    if not using(args.terms, "maps") or (any(unknown) and not wanted):
        return [Taps(network) for network in networks]
    paths = []
    for role, arch, network, chosen in zip(
        ["student", *["teacher"] * len(teachers)], archs, networks, named, strict=True
    ):
        known = chosen.split(",") if chosen else default_taps(arch, network)
        if known is None:
            modules = ", ".join(name for name, _ in network.named_children())
            raise UserError(f"no taps are known for {arch}: name them by --{role}-taps (its modules: {modules})")
        paths.append(known)
    if not any(named):  # the published pairs leave the shallowest stages unused
        depth = min(len(known) for known in paths)
        paths = [known[-depth:] for known in paths]
    for known in paths[1:]:
        if len(known) != len(paths[0]) and (paired := pairing(args.terms)):
            raise UserError(
                f"student and teacher need as many taps each for {', '.join(paired)}; got {len(paths[0])} "
                f"({', '.join(paths[0])}) and {len(known)} ({', '.join(known)})"
            )
    try:
        return [Taps(network, known) for network, known in zip(networks, paths, strict=True)]
    except ValueError as error:
        raise UserError(str(error)) from error


def observe_share(args: Namespace, num_images: int) -> float:
    """Return the share of each batch to observe online, so that a period sees --mgd-max-images."""
    period = num_images * args.mgd_update_freq
    return min(1.0, args.mgd_max_images / period) if args.mgd_observe == "online" else 0.0


def match(
    args: Namespace,
    student: Taps,
    teacher: Taps,
    shown: View | None,
    share: float = 0.0,
    notes: list[str] | None = None,
) -> ChannelMatching:
    """Build the matching term for tapped networks: channels from a dry forward, margins from the teacher's norms.

    Args:
        args: the checked options.
        student: tapped.
        teacher: tapped, not folded.
        shown: what its images pass first.
        share: see `observe_share`.
        notes: takes a line that says where each tap's margins come from.

    Raises:
        UserError: taps that are no maps, or differ in resolution.
    """
    maps = [dry(args, student, None).features, dry(args, teacher, shown).features]
    norms = tapped_norms(args, teacher, shown)
    if notes is not None:
        notes.append(origins("mgd", args.mgd_margin, teacher, norms))
    for paths, pair in zip(zip(student.paths, teacher.paths, strict=True), zip(*maps, strict=True), strict=True):
        if any(m.ndim != 4 for m in pair) or pair[0].shape[2:] != pair[1].shape[2:]:
            shapes = [tuple(m.shape[1:]) for m in pair]
            raise UserError(
                f"taps {paths[0]} (student, {shapes[0]}) and {paths[1]} (teacher, {shapes[1]}) need maps of equal "
                "resolution: name others by --student-taps or --teacher-taps"
            )
    return ChannelMatching(
        [m.shape[1] for m in maps[0]],
        [m.shape[1] for m in maps[1]],
        [margin(args.mgd_margin, norm, m) for norm, m in zip(norms, maps[1], strict=True)],
        reducer=args.mgd_reducer,
        capacity=args.mgd_capacity,
        solver=args.mgd_solver,
        form=args.mgd_form,
        assignment=args.mgd_assignment,
        seed=args.seed,
        observe_share=share,
    )


def tapped_norms(args: Namespace, teacher: Taps, shown: View | None) -> list[nn.BatchNorm2d | None]:
    """Return the batch normalisation in front of each tap of a teacher, where it is that of the map."""
    images = torch.zeros(1, 3, args.img_size, args.img_size)
    return norms_before(teacher, images if shown is None else shown(images))


def origins(term: str, kind: str, teacher: Taps, norms: Sequence[nn.BatchNorm2d | None]) -> str:
    """Say of every tap of a teacher where its margins come from: a norm, the map itself, or nowhere."""
    names = {module: name for name, module in teacher.model.named_modules()}
    found = []
    for path, norm in zip(teacher.paths, norms, strict=True):
        measured = f"norm {names[norm]}" if kind == "bn" and norm is not None else "measured"
        found.append(f"{path} {'none' if kind == 'none' else measured}")
    return f"margins of {term}: {', '.join(found)}"


def bn_margins(args: Namespace, teacher: Taps, shown: View | None, notes: list[str]) -> list[Tensor | None]:
    """Return the margins of a teacher's taps as its norms give them, None where a margin has to be measured."""
    norms = tapped_norms(args, teacher, shown)
    notes.append(origins("ofd", "bn", teacher, norms))
    return [None if norm is None else bn_margin(norm) for norm in norms]


def margin(kind: str, norm: nn.BatchNorm2d | None, teacher_map: Tensor) -> Tensor | None:
    """Return the margins of a tap, or None where they are measured on the map."""
    if kind == "none":
        return torch.full((teacher_map.shape[1],), -torch.inf)
    return bn_margin(norm) if kind == "bn" and norm is not None else None
