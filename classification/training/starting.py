"""Build a job: list the images, build the networks, and load their weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from classification.data.folders import (
    MOST_COMPARED,
    DataFolder,
    check_heif,
    find_shared_images,
    read_folder,
    without_unreadable,
)
from classification.data.image_files import count_of, identical_pairs
from classification.data.listing import list_cached
from classification.data.lists import join_pile, read_pile
from classification.data.preprocessing import Preprocessing
from classification.data.soft_labels import ClassProbabilities, merge_soft_labels
from classification.errors import UserError
from classification.models import build, pretrained_source
from classification.models.pretrained import load_pretrained, published_preprocessing, usual_preprocessing
from classification.models.sizes import fit_size
from classification.models.weights import WeightFile, load_file, other_outputs
from classification.options.devices import Devices
from classification.options.options import Options
from classification.options.terms import needing
from classification.runs.folder import listing_place
from classification.runs.place import find_place
from classification.runs.world import Seed, device_of
from classification.training.job import Job
from classification.training.precision import widen
from classification.training.sources import Sources, find_sources, numbered_as
from mgd import logits_of


def start_job(options: Options, seed: Seed, *, with_teacher: bool) -> Job:
    """List the images of a run, build its networks, and load their weights.

    Architectures, image size and crop that the options do not give are taken from the networks' files.

    Raises:
        UserError: options, images or files are wrong.
    """
    run, networks = options.run, options.networks
    data, bad = _read_data(options)
    weights = networks.student_resume or run.resume or networks.pretrained or networks.use_pretrained
    only_teacher = run.evaluate and with_teacher and not weights
    sources = find_sources(options, with_student=not only_teacher, with_teacher=with_teacher)
    number = options.data.num_classes
    if run.evaluate and number is None:
        data = numbered_as(data, sources.classes)
    number = len(data.classes) if number is None else number
    if number < len(data.classes):
        raise UserError(f"--num-classes {number} is less than the {len(data.classes)} class folders")
    torch.manual_seed(seed.value)
    job = Job(options, seed, data, auto=run.resume == "auto", bad_images=bad, notes=sources.notes, num_classes=number)
    job.arch, job.specs, job.resume_from = sources.arch, sources.specs, sources.resume
    _add_student(job, sources, build_it=not only_teacher)
    if with_teacher:
        for spec, file in zip(job.specs, sources.teachers, strict=True):
            _add_teacher(job, sources, spec, file)
    job.sizes = {role: sum(p.numel() for p in net.parameters()) for role, (_, net) in job.networks().items()}
    return job


def _read_data(options: Options) -> tuple[DataFolder, dict[str, str]]:
    """Return the images of a run, and those that are skipped because they cannot be read."""
    data_options = options.data
    assert data_options.data is not None
    place, shared = listing_place(options.run), find_place(options.devices).size > 1
    settings = (options.labels, data_options.train_list, data_options.valid_list, data_options.num_classes)
    read = partial(_read_folder, options)
    data = list_cached(read, place, data_options.data, settings, shared=shared)
    if options.run.evaluate:
        data = replace(data, train=[])
    elif options.pile.pile_list:
        data = _with_pile(data, options)
    bad: dict[str, str] = {}
    if data_options.bad_images == "skip":
        data, bad = without_unreadable(data, options.devices.workers)
    else:
        check_heif(data)
    if not options.run.evaluate:
        data.notes.extend(find_shared_images(data))
    return data, bad


def _read_folder(options: Options) -> DataFolder:
    data_options = options.data
    assert data_options.data is not None
    return read_folder(
        data_options.data,
        labels=options.labelled,
        train_list=data_options.train_list,
        valid_list=data_options.valid_list,
        num_classes=data_options.num_classes,
        evaluate=options.run.evaluate or options.labels == "pseudo",
    )


def _with_pile(data: DataFolder, options: Options) -> DataFolder:
    """Add the images of --pile-list to train.

    Raises:
        UserError: a list is wrong, or has images of valid.
    """
    pile_options = options.pile
    if pile_options.pile_targets == "soft" and (options.data.mixup or options.data.cutmix):
        raise UserError(
            "--pile-targets soft does not work with --mixup and --cutmix, which mix hard labels: leave one out"
        )
    pile = read_pile(pile_options.pile_list, pile_options.pile_root, data.classes, labels=options.labelled)
    if len(pile) + len(data.valid) <= MOST_COMPARED:
        copies = identical_pairs([path for path, _ in data.valid], [path for path, _ in pile])
        if copies:
            first = f"{copies[0][1]} = {copies[0][0]}"
            raise UserError(
                f"--pile-list holds {count_of(len(copies), 'image')} of valid, for example {first}: leave such images "
                "out with `mgd select --exclude`"
            )
    soft: dict[str, ClassProbabilities] = {}
    if pile_options.pile_targets == "soft" and options.labelled:
        pile, soft = merge_soft_labels(pile_options.pile_list, pile)
    train = join_pile(data.train, pile, 1 if options.labels == "pseudo" else pile_options.pile_share)
    lists = ", ".join(pile_options.pile_list)
    note = f"{len(pile)} images of {lists} labelled by a teacher; {len(train)} images per epoch"
    return replace(data, train=train, notes=[*data.notes, note], soft=soft)


@torch.no_grad()
def _try(arch: str, model: nn.Module, size: int, num_classes: int) -> None:
    """Run a network once, and refuse it if it does not return `num_classes` logits for an image of this size."""
    model.eval()
    try:
        output = model(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        raise UserError(f"{arch} does not run at --img-size {size}: {' '.join(str(error).split())}") from error
    try:
        logits = logits_of(output)
    except TypeError as error:
        raise UserError(f"{arch}: {error}") from error
    if logits.shape != (1, num_classes):
        raise UserError(f"{arch} does not return {num_classes} logits per image: choose another network")


def _add_student(job: Job, sources: Sources, *, build_it: bool) -> None:
    """Build and load the student, and decide its preprocessing."""
    options, published = job.options, None
    evaluate = options.run.evaluate
    if build_it:
        file = sources.student or sources.resumed
        model = _trainable(options.devices, build(job.arch, job.num_classes, file.configuration if file else None))
        downloads = (options.networks.pretrained or options.networks.use_pretrained) and not sources.resumes
        has_processor = job.arch.startswith("hf:") and file is None  # beside its configuration
        if downloads or has_processor or (sources.student and job.arch.startswith("timm:")):
            published = published_preprocessing(model, job.arch)
        elif evaluate:
            published = usual_preprocessing(model, job.arch)
    job.preprocessing = sources.student_preprocessing(evaluate, published)
    size = job.preprocessing.img_size
    if not build_it:
        return
    if sources.student is not None:
        job.notes.append(_load(job, model, sources.student, job.arch, size, new_head=not evaluate))
    elif downloads:
        job.notes.append(load_pretrained(model, job.arch, option="--student-resume"))
    elif evaluate:
        raise UserError("--evaluate has no weights to evaluate: give a file with --student-resume, or --pretrained")
    _fit(job, job.arch, model, size)
    _say_preprocessing(job, "student", job.arch, job.preprocessing, sources.student or sources.resumed)
    job.student = nn.SyncBatchNorm.convert_sync_batchnorm(model) if options.devices.sync_bn else model
    _try(job.arch, job.student, size, job.num_classes)


def _fit(job: Job, arch: str, model: nn.Module, size: int) -> None:
    if fit_size(model, size):
        job.notes.append(f"{arch}: its position embeddings were resampled for images of {size} px")


def _trainable(devices: Devices, model: nn.Module) -> nn.Module:
    """Replace layers whose gradient is slow in bfloat16 on a CPU; call it before the network is tapped."""
    if devices.amp == "bf16" and device_of(devices).type == "cpu":
        widen(model)
    return model


def _say_preprocessing(
    job: Job, role: str, arch: str, preprocessing: Preprocessing, file: WeightFile | None, recipe: bool = False
) -> None:
    if preprocessing != Preprocessing.of(job.preprocessing.img_size, job.train_crop):
        source = "image processor" if arch.startswith("hf:") else "published weights"
        what = source if file is None or not file.preprocessing_values else "file"
        how = f"as its {what} had them"
        if recipe:
            how = f"as its recipe and its {what} say"
        elif file is not None and file.preprocessing(preprocessing) != preprocessing:
            how += ", except for the size"
        silent = ", of which its file says nothing" if file is not None and not file.preprocessing_values else ""
        job.notes.append(f"the {role} {arch} gets images {how}{silent}: {preprocessing}")


def _load(job: Job, model: nn.Module, file: WeightFile, arch: str, img_size: int, new_head: bool = False) -> str:
    silent = next((note for note in job.notes if note.startswith(f"{file.path} does not name its network")), None)
    try:
        return load_file(
            model,
            file,
            arch=arch,
            num_classes=job.num_classes,
            classes=job.data.classes,
            img_size=img_size,
            new_head=new_head,
        )
    except UserError as error:
        raise UserError(f"{error}; {silent}" if silent else str(error)) from error


def _add_teacher(job: Job, sources: Sources, spec: dict[str, Any], file: WeightFile | None) -> None:
    """Build a teacher, or a peer of mutual learning, and load it."""
    options, arch, classes = job.options, spec["arch"], job.num_classes
    evaluate = options.run.evaluate
    configuration = None if file is None else file.configuration
    model, published, outputs = build(arch, classes, configuration), None, None
    if not spec.get("frozen", True) and not (evaluate and file is not None):  # it trains on the student's images
        preprocessing = job.preprocessing
        if file is not None:
            job.notes.append(_load(job, model, file, arch, preprocessing.img_size))
            if (theirs := file.preprocessing(preprocessing)) != preprocessing:
                job.notes.append(
                    f"the peer {arch} was trained on {theirs}; now it gets the student's images, {preprocessing}"
                )
    else:
        if file is None or arch.startswith(("timm:", "hf:")):
            published = published_preprocessing(model, arch, spec.get("weights"))
        preprocessing = sources.teacher_preprocessing(job.preprocessing, spec, file, published)
        if file is not None:
            outputs = other_outputs(model, file, classes, job.data.classes)
        elif getattr(model, "pretrained_cfg", {}).get("num_classes") == 0:
            outputs = 0
        elif classes != 1000:
            outputs = 1000
        has_weights = file is not None or pretrained_source(arch) is not None
        if outputs is not None and has_weights and _reads_maps_alone(options):
            model = build(arch, outputs or classes, configuration)
            has = f"{outputs} outputs of other classes" if outputs else "no classifier"
            job.notes.append(f"the teacher {arch} has {has}: only its maps are used")
        elif outputs == 0 and not evaluate:
            raise UserError(
                f"the weights of the teacher {arch} have no classifier: use only terms on maps, for example "
                f"--distiller mgd, or train a head with mgd train {options.data.data} -a {arch} "
                f"{f'--student-resume {file.path}' if file else '--pretrained'} --linear-probe 1 and give its "
                "best.pth with --teacher-resume"
            )
        elif file is None and outputs is not None:
            raise UserError(
                f"the published weights of {arch} have 1000 classes, but this run has {classes}: train a teacher with "
                "mgd train and give its best.pth with --teacher-resume"
            )
        else:
            outputs = None
        job.notes.append(_load_teacher(job, model, spec, file, preprocessing, outputs))
        role = "teacher" if spec.get("frozen", True) else "peer"
        _say_preprocessing(job, role, arch, preprocessing, file, recipe=bool({"img_size", "mean", "std"} & set(spec)))
    if evaluate or not spec.get("frozen", True):
        model = _trainable(options.devices, model)
    if options.devices.sync_bn and not spec.get("frozen", True):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    _fit(job, arch, model, preprocessing.img_size)
    _try(arch, model, preprocessing.img_size, outputs or classes)
    job.teachers.append(model)
    job.teacher_preprocessing.append(preprocessing)
    job.other_classes.append(outputs is not None)


def _load_teacher(
    job: Job,
    model: nn.Module,
    spec: dict[str, Any],
    file: WeightFile | None,
    preprocessing: Preprocessing,
    outputs: int | None,
) -> str:
    arch = spec["arch"]
    if file is None:
        name = spec.get("weights")
        return load_pretrained(model, arch, option="--teacher-resume", name=name, new_head=outputs == 0)
    if outputs is None:
        return _load(job, model, file, arch, preprocessing.img_size)
    number = outputs or job.num_classes
    return load_file(
        model, file, arch=arch, num_classes=number, classes=None, img_size=preprocessing.img_size, new_head=outputs == 0
    )


def _reads_maps_alone(options: Options) -> bool:
    """Return whether a training's terms read only maps of the teachers, not logits."""
    names = [name for name, spec in options.table.items() if not spec.kind.alone]
    return not options.run.evaluate and bool(names) and set(names) <= set(needing(options.table, "maps"))
