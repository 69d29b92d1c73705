"""Options and recipes, joined and checked; learning rates; the record of how a run was made."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from classification.errors import UserError
from classification.options.choose import check_teachers, choose_terms
from classification.options.devices import Devices
from classification.options.dot import check_dot
from classification.options.effects import check_recipe, check_typed
from classification.options.groups import Optimisation
from classification.options.int8 import check_int8
from classification.options.options import Options, all_options, make_options, names_where
from classification.options.own_options import checkpoint_of, own_options
from classification.options.parser import Parser, build_parser, script_of
from classification.options.published import LABELLED, entries_of, without_aliases
from classification.options.recipe import read_recipe
from classification.options.stored_teacher import check_stored, settled_by
from classification.options.teachers import describe_teachers
from classification.options.term_module import digest_of, term_classes
from classification.options.terms import TermClasses, needing, term_table
from mgd import has_bfloat16


def parse(argv: list[str], prog: str, *, distillation: bool) -> Options:
    """Parse and check the command line; a recipe, or the run that is resumed, replaces the defaults.

    Args:
        argv: the command line.
        prog: the name by which the script is called, for its messages.
        distillation: whether it is main_mgd.py.

    Raises:
        UserError: anything that makes no sense, before any work is done.
    """
    parser = build_parser(prog, distillation=distillation)
    typed, chosen = _typed(parser, argv), _sources_of_defaults(argv)
    nested: dict[str, Any] = {}
    keys: dict[str, str] = {}
    recipe = None
    if chosen.resume and chosen.resume != "auto":
        nested = _default_to_run(parser, argv, chosen, typed)
    if chosen.config:
        nested, keys, recipe = _default_to_recipe(parser, chosen.config, distillation)
    cache = parser.parse_args(argv).teacher_cache if distillation and not chosen.evaluate else None
    if cache:
        parser.set_defaults(**settled_by(cache))
    values = _values(parser, argv, typed)
    recipe_teachers = [] if "teacher_arch" in typed else nested.get("teachers", [])
    options = _join(values, nested.get("terms", {}), recipe_teachers, typed, distillation, (script_of(values), *argv))
    if not options.run.evaluate:
        check_int8(options, total_epochs(options.optimisation))
        check_typed(options, typed)
        check_stored(options, typed)
        check_recipe(options, recipe, keys, nested, typed)
    return options


def _sources_of_defaults(argv: list[str]) -> Namespace:
    """Return the options of a command line that say which run or recipe replaces the defaults."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--resume")
    parser.add_argument("--term-module")
    parser.add_argument("-e", "--evaluate", action="store_true")
    return parser.parse_known_args(argv)[0]


def _default_to_run(parser: Parser, argv: list[str], chosen: Namespace, typed: Mapping[str, str]) -> dict[str, Any]:
    """Make the options of the run of --resume the parser's defaults; return its terms and teachers.

    An evaluation that names its folder takes nothing from the run except its weights.
    """
    named = parser.parse_args(argv).data is not None
    if chosen.evaluate and named:
        return {}
    given = {*typed, *(["data"] if named else [])}
    own, nested = own_options(
        checkpoint_of(chosen.resume), parser, given, evaluate=chosen.evaluate, term_module=chosen.term_module
    )
    parser.set_defaults(**{**own, **({"term": []} if "term" in typed else {})})
    return nested


def _default_to_recipe(
    parser: Parser, path: str, distillation: bool
) -> tuple[dict[str, Any], dict[str, str], Options | None]:
    """Make the options of a recipe the parser's defaults.

    Returns:
        Its terms and teachers; its key for each option; and its options with nothing typed over them, or None where
        these make no sense by themselves.
    """
    words, nested, keys = read_recipe(parser, Path(path), distillation)
    try:
        read = parser.parse_args(words)
    except UserError as error:
        raise UserError(f"recipe {path}: {error}") from error
    alone = _recipe_alone(read, nested, distillation)
    parser.set_defaults(**{key: value for key, value in vars(read).items() if key not in ("data", "config")})
    return nested, keys, alone


def _values(parser: Parser, argv: list[str], typed: Mapping[str, str]) -> dict[str, Any]:
    """Return the value of every option, whose defaults may be those of a run or recipe."""
    values = vars(parser.parse_args(argv))
    for name in sorted(names_where("file") & set(typed)):
        if values[name] in ("", [""]):
            raise UserError(f"{typed[name]} needs the name of a file or folder; got an empty one")
    if values["data"] is None:
        what = "the folder where the lists' paths begin" if values["train_list"] else "the folder of photographs"
        raise UserError(f"name {what}, as in {parser.prog} DIR; only --resume RUN needs none")
    if "student_resume" in typed and not {"pretrained", "use_pretrained"} & set(typed):
        values |= {"pretrained": False, "use_pretrained": 0}  # the file replaces the recipe's download
    values["resume"] = values["resume"] and checkpoint_of(values["resume"])
    if not (values["arch"] or values["student_resume"] or values["resume"]):  # else their files say
        values["arch"] = "resnet18"
    return values


def _join(
    values: dict[str, Any],
    terms: dict[str, Any],
    teachers: list[dict[str, Any]],
    typed: Collection[str],
    distillation: bool,
    command: tuple[str, ...] = (),
) -> Options:
    """Check the values of the options, and join them with a recipe's terms and teachers.

    Args:
        values: by name, as the parser gives them.
        terms: those of a recipe.
        teachers: likewise.
        typed: the options that were typed.
        distillation: whether they are those of main_mgd.py.
        command: the words of the command line.
    """
    options = make_options(values, command=command, distils=distillation)
    _check(options, distillation)
    if not distillation:
        if options.optimisation.optimizer == "dot":
            raise UserError(
                "--optimizer dot separates the gradients of labels and teachers: it works only with main_mgd.py"
            )
        table = term_table(entries_of([LABELLED], terms, values), [], term_classes(None))
        given = options.networks.teacher_resume or options.networks.teacher_arch
        alone = {"arch": options.networks.teacher_arch, "resume": options.networks.teacher_resume}
        labels = options.data.labels or "true"
        return replace(options, table=table, labels=labels, teachers=(alone,) if given else ())
    file, epochs = options.terms.term_module, total_epochs(options.optimisation)
    chosen = choose_terms(values, terms, typed, term_classes(file), epochs)
    options = replace(options, **chosen, term_digest=digest_of(file) if file else None)
    options = replace(options, teachers=tuple(describe_teachers(options, teachers)))
    if options.optimisation.optimizer == "dot":
        check_dot(options)
    if options.devices.teacher_threads and (views := needing(options.table, "views")):
        raise UserError(f"--teacher-threads computes one view of each image, but {', '.join(views)} compares two")
    joined = options.networks.teacher_mean == "probabilities" and not options.networks.teacher_cache
    check_teachers(options.table, options.teachers, joined=joined)
    return options


def _typed(parser: Parser, argv: list[str]) -> dict[str, str]:
    """Return the options on the command line: their destination, and as typed."""
    words = {word.split("=")[0] for word in argv if word.startswith("-")}
    return {action.dest: option for action in parser._actions for option in action.option_strings if option in words}


def _recipe_alone(values: Namespace, nested: dict[str, Any], distillation: bool) -> Options | None:
    """Return the options of a recipe with nothing typed over it, or None where they make no sense."""
    try:
        given = {**vars(values), "arch": values.arch or "resnet18"}
        return _join(given, nested.get("terms", {}), nested.get("teachers", []), (), distillation)
    except UserError:
        return None


def _check(options: Options, distillation: bool) -> None:
    optimisation, run, networks = options.optimisation, options.run, options.networks
    if optimisation.start_epoch >= total_epochs(optimisation):
        raise UserError(
            f"--start-epoch {optimisation.start_epoch} leaves nothing to train: epochs of this run "
            f"end at {total_epochs(optimisation)}"
        )
    if list(optimisation.lr_drop_epochs) != sorted(optimisation.lr_drop_epochs):
        raise UserError(f"--lr-drop-epochs must rise; got {list(optimisation.lr_drop_epochs)}")
    if run.resume == "auto" and not run.output:
        raise UserError("--resume auto needs --output FOLDER, the folder to resume in")
    if run.resume == "auto" and run.evaluate:
        raise UserError("--resume auto does not work with --evaluate: give --resume FILE or --student-resume FILE")
    if (
        run.resume not in ("", "auto")
        and run.output
        and Path(run.output).resolve() != Path(run.resume).resolve().parent
    ):
        raise UserError("--resume continues in the folder of its file: leave out --output")
    if run.evaluate and getattr(options, "calibrate", None):
        raise UserError("--calibrate and --evaluate exclude each other: give one of them")
    if (networks.pretrained or networks.use_pretrained) and networks.student_resume:
        raise UserError("--student-resume and pretrained weights exclude each other")
    if optimisation.accumulate > optimisation.batch_size:
        raise UserError(
            f"--accumulate {optimisation.accumulate} is more than the {optimisation.batch_size} images of a batch: "
            "raise -b"
        )
    if options.data.repeats > optimisation.batch_size:
        raise UserError(f"--repeats {options.data.repeats} is more than -b {optimisation.batch_size} images: raise -b")
    if options.data.labels == "pseudo" and not (options.pile.pile_list or run.evaluate):
        raise UserError("--labels pseudo needs --pile-list: name a list, or leave out --labels")
    if run.track == "trackio" and find_spec("trackio") is None:
        raise UserError("--track trackio needs trackio: pip install 'matching-guided-distillation[track]'")
    check_devices(options.devices)
    if distillation:
        _check_distillation(options)
    elif not run.evaluate and (networks.teacher_resume or networks.teacher_arch):
        raise UserError(
            "main_base.py trains without a teacher: use main_mgd.py, or --evaluate to compare with a teacher"
        )


def check_devices(devices: Devices) -> None:
    """Refuse devices that this machine lacks, and options that exclude each other.

    Raises:
        UserError: one of these.
    """
    try:
        device = torch.device(devices.device) if devices.device != "auto" else None
    except RuntimeError:
        raise UserError(f"unknown device {devices.device!r}: use auto, cpu, cuda or cuda:N") from None
    if device is not None and device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {devices.device} is not supported: use auto, cpu, cuda or cuda:N")
    _check_gpus(devices, device)
    if devices.compile:
        _check_compiler()
    _check_ranks(devices)


def _check_gpus(devices: Devices, device: torch.device | None) -> None:
    """Refuse GPUs that this machine lacks, and options that need a GPU or exclude one; `device` None is auto."""
    gpus, several = torch.cuda.device_count(), devices.multiprocessing_distributed
    one = devices.gpu is not None or (device is not None and device.index is not None)
    if devices.gpu is not None and devices.device not in ("auto", "cuda", f"cuda:{devices.gpu}"):
        raise UserError(f"--gpu {devices.gpu} and --device {devices.device} exclude each other")
    if several and one:
        raise UserError("--multiprocessing-distributed takes every visible GPU: leave --gpu and the device number out")
    if device is not None and device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"--device {devices.device}: this machine has {gpus} GPUs")
    if devices.gpu is not None and devices.gpu >= gpus:
        raise UserError(f"--gpu {devices.gpu}: this machine has {gpus} GPUs")
    on_gpu = devices.gpu is not None or (device.type == "cuda" if device is not None else gpus > 0)
    if devices.amp == "fp16" and not on_gpu:
        raise UserError("--amp fp16 needs a GPU: use bf16 or off")
    if devices.teacher_threads and on_gpu:
        raise UserError("--teacher-threads divides the cores of a CPU: on a GPU, leave it out")
    if devices.sync_bn and not on_gpu:
        raise UserError("--sync-bn 1 needs GPUs: torch cannot do this on CPUs")
    alone = devices.world_size <= 1 and not several and "RANK" not in os.environ
    if devices.compile and alone and on_gpu and gpus > 1 and not one:
        raise UserError(
            "--compile 1 does not work with DataParallel: choose one GPU with --gpu, or start ranks with torchrun"
        )
    if devices.dist_backend == "nccl" and not on_gpu:
        raise UserError("--dist-backend nccl needs GPUs: use gloo")


def _check_ranks(devices: Devices) -> None:
    """Refuse numbers of ranks that do not fit together."""
    if devices.sync_bn and not (devices.world_size > 1 or devices.multiprocessing_distributed or "RANK" in os.environ):
        raise UserError("--sync-bn 1 needs several ranks: --multiprocessing-distributed, --world-size or torchrun")
    if devices.world_size == 0 or devices.world_size < -1:
        raise UserError(f"--world-size must be positive; got {devices.world_size}")
    size = max(devices.world_size, 1)
    env = devices.dist_url == "env://"
    if devices.rank == -1:
        wrong = devices.world_size > 1 and not env
    else:
        wrong = not 0 <= devices.rank < size and not (env and devices.world_size == -1)
    if wrong:
        raise UserError(f"--world-size {size} needs --rank between 0 and {size - 1}; got {devices.rank}")


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise UserError("--compile 1 needs a C++ compiler such as g++: install one, or leave it out") from error


def _check_distillation(options: Options) -> None:
    data, networks, ahead = options.data, options.networks, options.devices.teacher_threads
    if ahead and (data.mixup or data.cutmix or options.optimisation.accumulate > 1):
        raise UserError("--teacher-threads does not work with --mixup, --cutmix or --accumulate: leave these out")
    if (threads := torch.get_num_threads()) <= ahead > 0:
        raise UserError(f"--teacher-threads {ahead} leaves no thread for the student, of {threads}: lower it")
    if networks.taps and (networks.student_taps or networks.teacher_taps):
        raise UserError("--taps names the paths of both networks: leave --student-taps and --teacher-taps out")


def total_epochs(optimisation: Optimisation) -> int:
    """Return how many epochs there are, those of the warmup included."""
    return int(optimisation.epochs + (optimisation.warmup_epochs if optimisation.warmup else 0))


def epoch_name(optimisation: Optimisation, epoch: int) -> str:
    """Name an epoch, counted from 0, as people count: "epoch 1/20"."""
    return f"epoch {epoch + 1}/{total_epochs(optimisation)}"


def learning_rate(optimisation: Optimisation, epoch: int, part: float) -> float:
    """Return the rate in `epoch` (from 0), `part` of it done.

    Steps and warmup change by the epoch: lr * ratio^(drops passed), and in the warmup lr * (0.1 + 0.9 e / E_w). Cosine
    changes by the step: lr/2 * (1 + cos(pi * share of the epochs after the warmup)).
    """
    warmup = optimisation.warmup_epochs if optimisation.warmup else 0
    rate = float(optimisation.lr)
    if epoch < warmup:
        return rate * (0.1 + 0.9 * epoch / warmup)
    if optimisation.lr_schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * (epoch - warmup + part) / optimisation.epochs))
    drops = sum(epoch >= drop + warmup for drop in optimisation.lr_drop_epochs)
    return float(rate * optimisation.lr_drop_ratio**drops)


def recorded_options(options: Mapping[str, Any], known: TermClasses) -> dict[str, Any]:
    """Return recorded options, also those of an earlier version, in the form that `recorded` returns now.

    Args:
        options: from the run folder.
        known: the classes of terms, by name.
    """
    rest, entries = without_aliases(options)
    # An option that the version of then did not have changed nothing: its default means the same.
    usual = {found.name: found.default for found in all_options(distillation="distiller" in rest)}
    rest = {**usual, **rest}
    return {**rest, "terms": {name: spec.record() for name, spec in term_table(entries, [], known).items()}}


def describe(command: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """Return what a run folder keeps about how it was made: options, versions, commit, machine."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "scipy", "ortools", "timm"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": list(command),
        "folder": str(Path.cwd()),
        "options": options,
        "versions": versions,
        "commit": _commit(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "bfloat16": has_bfloat16(torch.device("cpu")),
        },
    }


def _processor() -> str:
    """Return the name of the processor on Linux, and its kind elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((name for name in names if name), platform.processor() or platform.machine())


def _commit(root: Path = Path(__file__).parents[2]) -> str | None:
    """Return the commit of this code, with "-dirty" where a source file differs; None outside a repository."""
    if root.name in ("site-packages", "dist-packages"):  # installed: a repository around it is another project's
        return None
    try:
        head, changed = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
            for words in (("rev-parse", "HEAD"), ("diff", "--name-only", "HEAD", "--", "*.py", "*.yaml", "*.sh"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if changed.stdout else "")
