"""From checked options and loaded networks to a distiller: taps, terms, fast teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from classification.data.preprocessing import Preprocessing
from classification.errors import UserError
from classification.options import config
from classification.options.terms import mutual
from classification.runs.world import device_of
from classification.training.job import Job
from classification.training.stored import stored_probe
from classification.training.weighing import hyper_of
from mgd import Distiller, Ensemble, Frozen, Probe, Taps, View, fold_norms, freeze, has_bfloat16, probe
from mgd.distiller import Terms


def distil(job: Job, networks: Sequence[Taps]) -> Distiller:
    """Build the terms, and freeze the teachers, each in its fastest form; or let peers teach each other."""
    student, teachers = networks[0], networks[1:]
    if mutual(job.options.table):
        probes = [probe_of(job, network, None) for network in networks]
        others = [[other for other in probes if other is not own] for own in probes]
        pairs = zip(probes, others, strict=True)
        return Distiller.mutual(networks, [build_terms(job, own, rest) for own, rest in pairs])
    views = [view_of(job.preprocessing, theirs) for theirs in job.teacher_preprocessing]
    weights = [float(teacher.get("weight", 1.0)) for teacher in job.specs]
    probes = [
        probe_of(job, network, view, weight) for network, view, weight in zip(teachers, views, weights, strict=True)
    ]
    if job.stored is not None:
        probes = [stored_probe(job)]
    joint = job.stored is None and job.options.networks.teacher_mean == "probabilities"
    if joint:
        probes = [Probe(replace(probes[0].outputs, features=[]))]
    terms = build_terms(job, probe_of(job, student, None), probes)
    job.teachers = [fast_teacher(job, *pair) for pair in zip(teachers, views, strict=True)]
    return Distiller(student, freeze(Ensemble(job.teachers, weights)) if joint else job.teachers, terms)


def build_terms(job: Job, student: Probe, teachers: Sequence[Probe]) -> Terms:
    """Build the terms of one network that trains, each with its weight as a function of the epoch.

    Raises:
        UserError: a term refuses its hyper-parameters, or its taps are missing, or a tapped tensor is not a map.
    """
    terms, epochs = {}, config.total_epochs(job.options.optimisation)
    for name, spec in job.options.table.items():
        if "maps" in spec.needs and not student.outputs.features:
            raise UserError(
                f"the term {name} compares feature maps: name the taps with --student-taps and --teacher-taps"
            )
        try:
            term = spec.kind.build(student, teachers, len(job.data.train), hyper_of(job, name))
        except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: torch's own, about shapes or memory
            raise UserError(f"term {name}: {error}") from error
        terms[name] = (term, partial(spec.schedule.at, term.weight, epochs))
        job.notes.extend(f"{name}: {note}" for note in term.notes)
    return terms


def view_of(student: Preprocessing, teacher: Preprocessing) -> View | None:
    """Return the view that gives the teacher the student's images in its own size and normalisation; None if equal."""
    if (student.mean, student.std, student.img_size) == (teacher.mean, teacher.std, teacher.img_size):
        return None
    return View(student.mean, student.std, teacher.mean, teacher.std, teacher.img_size)


def probe_of(job: Job, network: Taps, view: View | None, weight: float | None = None) -> Probe:
    """Probe a network: its taps, norms, margins and logits on one batch.

    Args:
        job: its preprocessing is the student's.
        network: tapped, its norms not folded.
        view: turns the student's images into the network's own; None if they are the same.
        weight: of a frozen teacher among several; None for a network that trains.

    Raises:
        UserError: the forward does not reach a tap, or a tapped tensor is not a map; or the network returns no logits.
    """
    size = job.preprocessing.img_size
    images = torch.zeros(1, 3, size, size)
    try:
        viewed = images if view is None else view(images)
        probed = probe(network, viewed, weight=1.0 if weight is None else weight, frozen=weight is not None)
    except (ValueError, TypeError) as error:  # an error of the taps; the network itself runs
        raise UserError(str(error)) from error
    except RuntimeError as error:
        raise UserError(f"the networks do not run at --img-size {size} with these taps: {error}") from error
    return replace(probed, before_relu=job.before_relu)


def fast_teacher(job: Job, teacher: Taps, view: View | None) -> Frozen:
    """Freeze a teacher in its fastest form: norms folded, and by default bfloat16 if the device has it."""
    devices, size = job.options.devices, job.preprocessing.img_size
    images = torch.randn(1, 3, size, size)
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in teacher.modules())
    folded = fold_norms(teacher, images if view is None else view(images))
    dtype = devices.teacher_dtype
    if dtype == "auto":
        fallback = "float16" if devices.amp == "fp16" else "float32"
        dtype = "bfloat16" if has_bfloat16(device_of(devices)) else fallback
    job.teacher_dtype = dtype
    job.notes.append(f"teacher: frozen, {folded} of {norms} batch norms folded into convolutions, {dtype}")
    return freeze(teacher.to(getattr(torch, dtype)), view)
