"""Options and recipes, joined and checked; the rates and what a run keeps of them."""

from __future__ import annotations

import copy
import math
import os
import platform
import subprocess
from argparse import Namespace
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from classification.errors import UserError
from classification.models import DEFAULT_TEACHER
from classification.options.choose import check_teachers, choose_terms
from classification.options.effects import check_recipe, check_typed
from classification.options.options import names_where
from classification.options.own_options import checkpoint_of, own_options
from classification.options.parser import Parser, build_parser
from classification.options.published import ALIASES, LABELLED, entries_of, without_aliases
from classification.options.recipe import read_recipe
from classification.options.term_module import digest_of, known_terms
from classification.options.terms import Known, mutual, term_table
from classification.paths import is_file
from mgd import has_bfloat16


def parse(argv: list[str], prog: str, *, distillation: bool) -> Namespace:
    """Parse and check the command line, a recipe's values standing in for defaults.

    Raises:
        UserError: anything that makes no sense, before any work is done.
    """
    parser = build_parser(prog, distillation=distillation)
    recipe = Parser(add_help=False, allow_abbrev=False)
    recipe.add_argument("--config")
    recipe.add_argument("--resume")
    recipe.add_argument("--term-module")
    recipe.add_argument("-e", "--evaluate", action="store_true")
    chosen, _ = recipe.parse_known_args(argv)
    nested: dict[str, Any] = {}
    keys: dict[str, str] = {}
    alone = None
    typed = _typed(parser, argv)
    named = bool(chosen.resume) and parser.parse_args(argv).data is not None
    if chosen.resume and chosen.resume != "auto" and not (chosen.evaluate and named):
        given = {*typed, *(["data"] if named else [])}
        own, nested = own_options(
            checkpoint_of(chosen.resume), parser, given, evaluate=chosen.evaluate, term_module=chosen.term_module
        )
        parser.set_defaults(**{**own, **({"term": []} if "term" in typed else {})})
    if chosen.config:
        words, nested, keys = read_recipe(parser, Path(chosen.config), distillation)
        try:
            values = parser.parse_args(words)
        except UserError as error:
            raise UserError(f"recipe {chosen.config}: {error}") from error
        alone = _alone(values, nested, distillation)
        parser.set_defaults(**{key: value for key, value in vars(values).items() if key not in ("data", "config")})
    args = parser.parse_args(argv)
    args.command = [prog, *argv]
    if "student_resume" in typed and not {"pretrained", "use_pretrained"} & set(typed):
        args.pretrained, args.use_pretrained = False, 0  # a file in the place of the recipe's download
    for name in sorted(names_where("file") & set(typed)):
        if getattr(args, name) == "":
            raise UserError(f"{typed[name]} needs the name of a file or folder; got an empty one")
    if args.data is None:
        raise UserError(f"name the folder of photographs, as in {prog} DIR; --resume RUN alone takes that of a run")
    args.resume = args.resume and checkpoint_of(args.resume)
    if not (args.arch or args.student_resume or args.resume):  # else their files say
        args.arch = "resnet18"
    _check(args, distillation)
    _set_terms(args, nested.get("terms", {}), typed, distillation)
    if distillation:
        args.teachers = _teachers(args, [] if "teacher_arch" in typed else nested.get("teachers", []))
        _check_teachers(args)
    if not args.evaluate:
        check_typed(args, typed)
        check_recipe(args, alone, keys, nested, typed)
    return args


def _typed(parser: Parser, argv: list[str]) -> dict[str, str]:
    """Return the options on the command line: their destination, and as typed."""
    words = {word.split("=")[0] for word in argv if word.startswith("-")}
    return {action.dest: option for action in parser._actions for option in action.option_strings if option in words}


def _alone(values: Namespace, nested: dict[str, Any], distillation: bool) -> Namespace | None:
    """Return the options of a recipe with nothing typed over it, or None where they make no sense."""
    alone = copy.deepcopy(values)
    try:
        if distillation:
            _check_distillation(alone)
        _set_terms(alone, nested.get("terms", {}), {}, distillation)
    except UserError:
        return None
    return alone


def _check(args: Namespace, distillation: bool) -> None:
    if args.start_epoch >= total_epochs(args):
        raise UserError(f"--start-epoch {args.start_epoch} leaves nothing to do: epochs end at {total_epochs(args)}")
    if args.lr_drop_epochs != sorted(args.lr_drop_epochs):
        raise UserError(f"--lr-drop-epochs must rise; got {args.lr_drop_epochs}")
    if args.resume == "auto" and not args.output:
        raise UserError("--resume auto goes on in the folder of --output: name it")
    if args.resume == "auto" and args.evaluate:
        raise UserError("--evaluate takes a file: --resume FILE or --student-resume FILE")
    if (
        args.resume not in ("", "auto")
        and args.output
        and Path(args.output).resolve() != Path(args.resume).resolve().parent
    ):
        raise UserError("--resume goes on in the folder of its file: leave --output out")
    if args.evaluate and getattr(args, "calibrate", None):
        raise UserError("--calibrate and --evaluate exclude each other: each does its work and leaves")
    if (args.pretrained or args.use_pretrained) and args.student_resume:
        raise UserError("--student-resume and pretrained weights exclude each other")
    if args.accumulate > args.batch_size:
        raise UserError(f"--accumulate {args.accumulate} divides batches of {args.batch_size} images: raise -b")
    _check_devices(args)
    if distillation:
        _check_distillation(args)
    elif not args.evaluate and (args.teacher_resume or args.teacher_arch):
        raise UserError("main_base.py trains one network; a teacher belongs to --evaluate, or to main_mgd.py")


def _check_devices(args: Namespace) -> None:
    try:
        device = torch.device(args.device) if args.device != "auto" else None
    except RuntimeError:
        raise UserError(f"unknown device {args.device!r}: use auto, cpu, cuda or cuda:N") from None
    gpus = torch.cuda.device_count()
    if device is not None and device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {args.device} is not supported: use auto, cpu, cuda or cuda:N")
    if args.gpu is not None and args.device not in ("auto", "cuda", f"cuda:{args.gpu}"):
        raise UserError(f"--gpu {args.gpu} and --device {args.device} exclude each other")
    if args.multiprocessing_distributed and (args.gpu is not None or (device is not None and device.index is not None)):
        raise UserError("--multiprocessing-distributed takes every visible GPU: leave --gpu and the device number out")
    if device is not None and device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"--device {args.device}: this machine shows {gpus} GPUs")
    if args.gpu is not None and args.gpu >= gpus:
        raise UserError(f"--gpu {args.gpu}: this machine shows {gpus} GPUs")
    on_gpu = args.gpu is not None or (device.type == "cuda" if device is not None else gpus > 0)
    if args.amp == "fp16" and not on_gpu:
        raise UserError("--amp fp16 needs a GPU: use bf16 or off")
    if getattr(args, "teacher_threads", 0) and on_gpu:
        raise UserError("--teacher-threads divides a processor's cores: on a GPU leave it out")
    if args.sync_bn and not on_gpu:
        raise UserError("--sync-bn 1 needs GPUs: torch has no CPU form of it")
    if args.sync_bn and not (args.world_size > 1 or args.multiprocessing_distributed or "RANK" in os.environ):
        raise UserError("--sync-bn 1 needs several ranks: --multiprocessing-distributed, --world-size or torchrun")
    alone = args.world_size <= 1 and not args.multiprocessing_distributed and "RANK" not in os.environ
    if args.compile and alone and on_gpu and gpus > 1 and args.gpu is None and (device is None or device.index is None):
        raise UserError("--compile 1 does not go with DataParallel: name one GPU by --gpu, or start ranks by torchrun")
    if args.compile:
        _check_compiler()
    if args.dist_backend == "nccl" and not on_gpu:
        raise UserError("--dist-backend nccl needs GPUs: use gloo")
    if args.world_size == 0 or args.world_size < -1:
        raise UserError(f"--world-size must be positive; got {args.world_size}")
    size = max(args.world_size, 1)
    env = args.dist_url == "env://"
    if args.rank == -1:
        wrong = args.world_size > 1 and not env
    else:
        wrong = not 0 <= args.rank < size and not (env and args.world_size == -1)
    if wrong:
        raise UserError(f"--world-size {size} needs --rank between 0 and {size - 1}; got {args.rank}")


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise UserError("--compile 1 needs a C++ compiler, as g++: install one, or leave it out") from error


def _check_distillation(args: Namespace) -> None:
    if args.teacher_threads and (args.mixup or args.cutmix or args.accumulate > 1):
        raise UserError(
            "--teacher-threads needs batches as they are read: leave --mixup, --cutmix and --accumulate out"
        )
    if (threads := torch.get_num_threads()) <= args.teacher_threads > 0:
        raise UserError(f"--teacher-threads {args.teacher_threads} leaves the student none of {threads} threads")
    if args.taps and (args.student_taps or args.teacher_taps):
        raise UserError("--taps names the paths of both networks: leave --student-taps and --teacher-taps out")
    args.student_taps, args.teacher_taps = args.student_taps or args.taps, args.teacher_taps or args.taps


def _set_terms(args: Namespace, recipe: dict[str, Any], typed: dict[str, str], distillation: bool) -> None:
    """Settle which terms there are; what was typed wins over the recipe."""
    if not distillation:
        args.terms = term_table(entries_of([LABELLED], recipe, vars(args)), [], known_terms(None))
        return
    known = known_terms(args.term_module)
    args.term_digest = digest_of(args.term_module) if args.term_module else None
    for name, value in choose_terms(vars(args), recipe, typed, known, total_epochs(args)).items():
        setattr(args, name, value)


def _teachers(args: Namespace, recipe: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what is known of each teacher: arch, resume, and of a recipe's weights, weight, img_size, frozen."""
    peers = bool(mutual(args.terms))
    if recipe:
        files = _files(args.teacher_resume, len(recipe)) if args.teacher_resume else []
        if files and len(files) != len(recipe):
            raise UserError(f"--teacher-resume names {len(files)} files for the recipe's {len(recipe)} teachers")
        return [{**teacher, "resume": file} for teacher, file in zip(recipe, files, strict=True)] if files else recipe
    archs: list[str | None] = list(args.teacher_arch.split(",")) if args.teacher_arch else []
    files = _files(args.teacher_resume, len(archs)) if args.teacher_resume else []
    if not archs and not files and args.arch:
        archs = [args.arch if peers else DEFAULT_TEACHER.get(args.arch, "resnet50")]
    archs = archs or [None] * max(1, len(files))  # which their files say
    files = files or [""] * len(archs)
    if len(files) != len(archs):
        names = ", ".join(map(str, archs))
        raise UserError(f"--teacher-resume names {len(files)} files for {len(archs)} teachers ({names})")
    return [{"arch": arch, "resume": file, "frozen": not peers} for arch, file in zip(archs, files, strict=True)]


def _files(text: str, number: int) -> list[str]:
    """Split names of files at commas, except those within a name of a file that is there.

    Args:
        text: the names.
        number: how many there should be; 0 where that is not known.
    """
    parts = text.split(",")
    found: list[list[str]] = [[]]  # the ways to divide what was read, the fewest files first
    ways: list[list[list[str]]] = [found]
    for end in range(1, len(parts) + 1):
        ways.append(
            [
                [*way, name]
                for start in range(end)
                for name in [",".join(parts[start:end])]
                if is_file(name)
                for way in ways[start]
            ][:100]
        )
    fitting = [way for way in ways[-1] if len(way) == number] or ways[-1]
    return min(fitting, key=len) if fitting else parts


def _check_teachers(args: Namespace) -> None:
    check_teachers(args.terms, args.teachers, joined=args.teacher_mean == "probabilities")
    if all(teacher["arch"] for teacher in args.teachers):
        args.teacher_arch = ",".join(teacher["arch"] for teacher in args.teachers)


def total_epochs(args: Namespace) -> int:
    """Return how many epochs there are, those of the warmup included."""
    return int(args.epochs + (args.warmup_epochs if args.warmup else 0))


def epoch_name(args: Namespace, epoch: int) -> str:
    """Name an epoch, counted from 0, as people count: "epoch 1/20"."""
    return f"epoch {epoch + 1}/{total_epochs(args)}"


def learning_rate(args: Namespace, epoch: int, part: float) -> float:
    """Return the rate in `epoch` (from 0), `part` of it done.

    Steps and warmup change by the epoch: lr * ratio^(drops passed), and in the warmup lr * (0.1 + 0.9 e / E_w). Cosine
    changes by the step: lr/2 * (1 + cos(pi * share of the epochs after the warmup)).
    """
    warmup = args.warmup_epochs if args.warmup else 0
    rate = float(args.lr)
    if epoch < warmup:
        return rate * (0.1 + 0.9 * epoch / warmup)
    if args.lr_schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * (epoch - warmup + part) / args.epochs))
    drops = sum(epoch >= drop + warmup for drop in args.lr_drop_epochs)
    return float(rate * args.lr_drop_ratio**drops)


def recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options as a run keeps them: each term with all its keys, instead of the options that say some."""
    kept = {name: value for name, value in options.items() if name != "command" and name not in ALIASES}
    return {**kept, "terms": {name: spec.record() for name, spec in options["terms"].items()}}


def recorded_then(options: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """Return the options of a run folder, also of an earlier version, as `recorded` would give them now.

    Args:
        options: as recorded then.
        known: the classes of terms, by name.
    """
    rest, entries = without_aliases(options)
    return {**rest, "terms": {name: spec.record() for name, spec in term_table(entries, [], known).items()}}


def describe(args: Namespace) -> dict[str, Any]:
    """Return what a run folder keeps about how it was made: options, versions, commit, machine."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "scipy", "ortools", "timm"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": args.command,
        "folder": str(Path.cwd()),
        "options": recorded(vars(args)),
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
    """Return the processor's name where Linux tells it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((name for name in names if name), platform.processor() or platform.machine())


def _commit(root: Path = Path(__file__).parents[2]) -> str | None:
    """Return this code's commit, "-dirty" behind it where a file that is run differs; None outside a repository."""
    try:
        head, changed = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
            for words in (("rev-parse", "HEAD"), ("diff", "--name-only", "HEAD", "--", "*.py", "*.yaml", "*.sh"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if changed.stdout else "")
