"""From checked options and loaded networks to a distiller: taps, terms, fast teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from classification.data.preprocessing import Preprocessing
from classification.errors import UserError
from classification.models import default_taps
from classification.options import config
from classification.options.terms import mutual, needing, pairing, using
from classification.runs.world import device_of
from classification.training.job import Job
from mgd import Distiller, Ensemble, Frozen, Probe, Taps, View, fold_norms, freeze, has_bfloat16, probe
from mgd.distiller import Terms


def distil(job: Job, networks: Sequence[Taps]) -> Distiller:
    """Build the terms, and freeze the teachers, each in its fastest form; or let peers teach each other."""
    student, teachers = networks[0], networks[1:]
    if mutual(job.options.table):
        probes = [look(job, network, None) for network in networks]
        others = [[other for other in probes if other is not own] for own in probes]
        pairs = zip(probes, others, strict=True)
        return Distiller.mutual(networks, [build_terms(job, own, rest) for own, rest in pairs])
    views = [view(job.preprocessing, seen) for seen in job.teacher_preprocessing]
    weights = [float(teacher.get("weight", 1.0)) for teacher in job.specs]
    seen = [
        replace(look(job, network, shown), weight=weight, frozen=True)
        for network, shown, weight in zip(teachers, views, weights, strict=True)
    ]
    joint = job.options.networks.teacher_mean == "probabilities"
    if joint:
        seen = [Probe(replace(seen[0].outputs, features=[]))]
    terms = build_terms(job, look(job, student, None), seen)
    job.teachers = [speed_up(job, *pair) for pair in zip(teachers, views, strict=True)]
    return Distiller(student, freeze(Ensemble(job.teachers, weights)) if joint else job.teachers, terms)


def build_terms(job: Job, student: Probe, teachers: Sequence[Probe]) -> Terms:
    """Build the terms of one network that learns, each with its weight over the epochs.

    Raises:
        UserError: hyper-parameters that a term refuses, taps that it needs, tapped tensors that are no maps.
    """
    terms, epochs = {}, config.total_epochs(job.options.optimisation)
    for name, spec in job.options.table.items():
        if "maps" in spec.needs and not student.outputs.features:
            raise UserError(
                f"the term {name} compares feature maps: name the taps by --student-taps and --teacher-taps"
            )
        try:
            term = spec.kind.build(student, teachers, len(job.data.train), spec.hyper)
        except (ValueError, TypeError, RuntimeError) as error:  # torch's own: shapes, or memory that is not there
            raise UserError(f"term {name}: {error}") from error
        terms[name] = (term, partial(spec.schedule.at, term.weight, epochs))
        job.notes.extend(f"{name}: {note}" for note in term.notes)
    return terms


def view(student: Preprocessing, teacher: Preprocessing) -> View | None:
    """Return what a teacher of another size or normalisation needs between the student's images and itself."""
    if (student.mean, student.std, student.img_size) == (teacher.mean, teacher.std, teacher.img_size):
        return None
    return View(student.mean, student.std, teacher.mean, teacher.std, teacher.img_size)


def look(job: Job, network: Taps, shown: View | None) -> Probe:
    """Return what one dry forward tells of a network.

    Args:
        job: with what the student sees.
        network: tapped, not folded.
        shown: what its images pass first.

    Raises:
        UserError: taps that are not reached, read what is no tensor, or do not say how it is laid out; no logits.
    """
    size = job.preprocessing.img_size
    images = torch.zeros(1, 3, size, size)
    try:
        found = probe(network, images if shown is None else shown(images), frozen=False)
    except (ValueError, TypeError) as error:  # of the taps: what they read says that the network runs
        raise UserError(str(error)) from error
    except RuntimeError as error:
        raise UserError(f"the networks do not run at --img-size {size} with these taps: {error}") from error
    return replace(found, before_relu=not (job.options.student_taps or job.options.teacher_taps))


def speed_up(job: Job, teacher: Taps, shown: View | None) -> Frozen:
    """Freeze a teacher in its fastest form: norms folded, in bfloat16 where the device has it."""
    devices, size = job.options.devices, job.preprocessing.img_size
    images = torch.randn(1, 3, size, size)
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in teacher.modules())
    folded = fold_norms(teacher, images if shown is None else shown(images))
    dtype = devices.teacher_dtype
    if dtype == "auto":
        narrow = "float16" if devices.amp == "fp16" else "float32"
        dtype = "bfloat16" if has_bfloat16(device_of(devices)) else narrow
    job.teacher_dtype = dtype
    job.notes.append(f"teacher: frozen, {folded} of {norms} batch norms folded into convolutions, {dtype}")
    return freeze(teacher.to(getattr(torch, dtype)), shown)


def tap(job: Job) -> list[Taps]:
    """Tap the student and its teachers where a term reads maps: at the paths given, or those of their families.

    Raises:
        UserError: no taps known, unknown paths, or another number of them.
    """
    assert job.student is not None
    options, table, teachers = job.options, job.options.table, job.teachers
    networks = [job.student, *teachers]
    archs = [job.arch, *(spec["arch"] for spec in job.specs)]
    lists = options.teacher_taps.split(";") if options.teacher_taps else [None]
    named = [options.student_taps, *(lists * len(teachers) if len(lists) == 1 else lists)]
    if len(named) != len(networks):
        raise UserError(f"--teacher-taps names paths of {len(named) - 1} teachers, there are {len(teachers)}")
    unknown = [not given and default_taps(*pair) is None for given, *pair in zip(named, archs, networks, strict=True)]
    wanted = needing(table, "maps") or (any(named) and using(table, "maps"))
    if not using(table, "maps") or (any(unknown) and not wanted):
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
        if len(known) != len(paths[0]) and (paired := pairing(table)):
            raise UserError(
                f"student and teacher need as many taps each for {', '.join(paired)}; got {len(paths[0])} "
                f"({', '.join(paths[0])}) and {len(known)} ({', '.join(known)})"
            )
    try:
        return [Taps(network, known) for network, known in zip(networks, paths, strict=True)]
    except ValueError as error:
        raise UserError(str(error)) from error
