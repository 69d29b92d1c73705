"""Options, recipes and their checks."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import platform
import subprocess
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from classification.errors import UserError
from mgd.flow import ASSIGNMENTS
from mgd.matching import FORMS


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are `UserError`s, with the nearest option names."""

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.split() if message.startswith("unrecognized") else ():
            if word.startswith("-"):
                near = difflib.get_close_matches(word.split("=")[0], known, n=3)
                message += f"; close ones are {', '.join(near)}" if near else f"; see {self.prog} --help"
        raise UserError(message)


def _number(kind: type, low: float, high: float = math.inf, *, open_low: bool = False) -> Callable[[str], Any]:
    """A type for argparse: a finite number in [low, high], or above `low` with `open_low`."""

    def parse(text: str) -> Any:
        bound = f"{'above' if open_low else 'at least'} {low:g}" + (f", at most {high:g}" if high < math.inf else "")
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        # A NaN fails the first comparison.
        if not low <= value <= high or value == math.inf or (open_low and value == low):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} {bound}; got {text!r}")
        return value

    return parse


_count = _number(int, 1)
_whole = _number(int, 0)
_positive = _number(float, 0, open_low=True)
_nonnegative = _number(float, 0)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", metavar="DIR", help="folder of photographs: train/CLASS/*.jpg and valid/CLASS/*.jpg (or val/)")
    add("--config", metavar="FILE", help="recipe: a YAML mapping of option names to values; the command line wins")
    add("-a", "--arch", default="resnet18", help="the network to train: a name, torchvision:NAME or timm:NAME")
    add("--num-classes", type=_count, help="default: the number of class folders in train/")
    add("--img-size", type=_number(int, 8), default=224, help="side of the square the networks see, in pixels")
    add("--output", metavar="FOLDER", help="run folder; default: a new one under runs/")
    add("--epochs", type=_count, default=100, help="epochs of training, those of the warmup not counted")
    add("--start-epoch", type=_whole, default=0, help="epoch to begin with, counted from 0")
    add("-b", "--batch-size", type=_count, default=256, help="images a step, over all devices and ranks together")
    add("--resume", metavar="FILE", default="", help="go on from the last.pth of a run, in its folder")
    add("-e", "--evaluate", action="store_true", help="evaluate and leave")
    add("-p", "--print-freq", type=_count, default=10, help="steps between two printed lines")
    add(
        "--seed",
        type=_number(int, 0, 2**31 - 1),
        help="seed of everything random; default: a fresh one, written to config.json",
    )
    add(
        "-j",
        "--workers",
        type=_whole,
        default=min(8, os.cpu_count() or 1),
        help="loading processes, shared by the ranks that one command starts",
    )
    add("--cache", choices=("off", "ram"), default="off", help="ram: decode every image once and keep it in memory")
    add("--channels-last", type=int, choices=(0, 1), default=1, help="memory layout of maps: 1 is faster nearly always")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--lr", "--learning-rate", type=_positive, default=0.1, help="learning rate of SGD")
    add("--momentum", type=_number(float, 0, 0.9999), default=0.9, help="Nesterov momentum")
    add("--wd", "--weight-decay", dest="weight_decay", type=_nonnegative, default=1e-4, help="weight decay of SGD")
    add("--lr-schedule", choices=("step", "cosine"), default="step", help="drops at epochs, or half a cosine to 0")
    add("--lr-drop-ratio", type=_positive, default=0.1, help="step: factor at every drop")
    add("--lr-drop-epochs", type=_count, nargs="+", default=[31, 61, 81], help="step: epochs of the drops")
    add("--warmup", type=int, choices=(0, 1), default=0, help="1: linear warmup from 0.1 of the rate, added in front")
    add("--warmup-epochs", type=_count, default=10, help="epochs that --warmup 1 adds in front")
    add("--label-smoothing", type=_number(float, 0, 0.9999), default=0.0, help="of the cross-entropy, in [0, 1)")
    add(
        "--train-crop", choices=("resized", "pad"), default="resized", help="pad: images fill the frame already (CIFAR)"
    )
    add("--hflip", type=int, choices=(0, 1), default=1, help="0: no mirrored images (digits, text)")
    add("--pretrained", action="store_true", help="start from the published ImageNet weights")
    add("--use-pretrained", type=int, choices=(0, 1), default=0, help="1: the same as --pretrained")
    add("--student-resume", metavar="FILE", help="weights of the network to train or evaluate")
    add("--teacher-arch", help="the teacher's network; default: resnet50, and resnet152 for the student resnet50")
    add("--teacher-resume", metavar="FILE", help="weights of the teacher")


def _add_devices(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--gpu", type=_whole, help="use this GPU only")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision; fp16 needs a GPU")
    add("--world-size", type=int, default=-1, help="nodes (with --multiprocessing-distributed), or else ranks")
    add("--rank", type=int, default=-1, help="number of this node, or of this rank")
    add("--dist-url", default="tcp://127.0.0.1:23456", help="where rank 0 listens; env:// takes the environment's")
    add("--dist-backend", choices=("nccl", "gloo"), help="how ranks talk; default: nccl on GPUs, gloo on CPUs")
    add("--multiprocessing-distributed", action="store_true", help="one process per GPU of this node")
    add("--sync-bn", type=int, choices=(0, 1), default=0, help="1: batch statistics over all GPUs of a DDP run")


def _add_distillation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--distiller", default="mgd", help="mgd, kd or mgd+kd")
    add("--loss-factor", type=_positive, default=1e4, help="form sum: mgd is divided by it (1e4 suits 224 px)")
    add(
        "--mgd-form",
        choices=FORMS,
        default="sum",
        help="sum: as published; mean: per element, for every image size; relative: to the teacher's maps",
    )
    add("--mgd-weight", type=_nonnegative, default=5.0, help="forms mean and relative: factor of the mgd term")
    add(
        "--mgd-schedule",
        choices=("constant", "linear", "cosine"),
        default="constant",
        help="how the factor of the mgd term falls to 0 over the epochs, if it does",
    )
    add(
        "--mgd-assignment",
        choices=ASSIGNMENTS,
        default="cheapest",
        help="which flow; all but cheapest are controls that show what matching is worth",
    )
    add(
        "--mgd-reducer", choices=("amp", "rd", "sp", "sm"), default="amp", help="how teacher channels become one target"
    )
    add("--mgd-update-freq", type=_whole, default=2, help="epochs between two matchings; 0: once, before training")
    add("--mgd-with-kd", type=int, choices=(0, 1), default=0, help="1: the same as --distiller mgd+kd")
    add(
        "--mgd-capacity",
        choices=("spread", "truncate", "reference", "single"),
        help="how many teacher channels guide one; default: spread, for sm single",
    )
    add("--mgd-solver", choices=("auto", "ortools", "scipy"), default="auto", help="exact solver of the flow")
    add("--mgd-max-images", type=_count, default=20_000, help="images of a matching pass")
    add(
        "--mgd-margin",
        choices=("bn", "map", "none"),
        default="bn",
        help="bn: from the norm before the tap, or else map",
    )
    add("--kd-weight", type=_nonnegative, default=1.0, help="factor of the kd term")
    add("--kd-temperature", type=_positive, help="softens both networks' logits; default: 1.5 beside mgd, 4 alone")
    add(
        "--teacher-dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="number type of the frozen teacher; auto: bfloat16 where the device computes in it",
    )
    add("--student-taps", metavar="PATHS", help="comma-separated, as layer2.1.relu@in#-1; default: by family")
    add("--teacher-taps", metavar="PATHS", help="the same for the teacher")
    add("--taps", metavar="PATHS", help="the same paths for student and teacher")


def build_parser(prog: str, *, distillation: bool) -> argparse.ArgumentParser:
    """Return the parser of `main_mgd.py` (with `distillation`) or `main_base.py`."""
    what = "Distil a student from a teacher" if distillation else "Train or evaluate one network"
    parser = _Parser(prog=prog, description=f"{what} on a folder of photographs.", allow_abbrev=False)
    _add_common(parser)
    _add_training(parser)
    _add_devices(parser)
    if distillation:
        _add_distillation(parser)
    return parser


def parse(argv: list[str], prog: str, *, distillation: bool) -> Namespace:
    """Parse and check the command line, a recipe's values standing in for defaults.

    Raises:
        UserError: anything that makes no sense, before any work is done.
    """
    parser = build_parser(prog, distillation=distillation)
    recipe = _Parser(add_help=False, allow_abbrev=False)
    recipe.add_argument("--config")
    chosen, _ = recipe.parse_known_args(argv)
    if chosen.config:
        values = vars(parser.parse_args(["DIR", *_recipe_words(parser, Path(chosen.config))]))
        parser.set_defaults(**{key: value for key, value in values.items() if key not in ("data", "config")})
    args = parser.parse_args(argv)
    args.command = [prog, *argv]
    _check(args, distillation)
    if not args.evaluate:
        _check_effects(args, _typed(parser, argv))
    return args


def _typed(parser: argparse.ArgumentParser, argv: list[str]) -> dict[str, str]:
    """Return the options on the command line: their destination, and as typed."""
    words = {word.split("=")[0] for word in argv if word.startswith("-")}
    return {action.dest: option for action in parser._actions for option in action.option_strings if option in words}


def _check_effects(args: Namespace, typed: dict[str, str]) -> None:
    """Refuse options that were typed and would change nothing."""
    terms = getattr(args, "distiller", "").split("+")
    of_mgd = {name for name in vars(args) if name.startswith("mgd_")} | {"loss_factor"}
    rules = [
        ("--distiller mgd", "mgd" in terms, of_mgd | {"taps", "student_taps", "teacher_taps"}),
        ("--mgd-with-kd 1 or --distiller kd", "kd" in terms, {"kd_weight", "kd_temperature"}),
        ("--lr-schedule step", args.lr_schedule == "step", {"lr_drop_ratio", "lr_drop_epochs"}),
        ("--mgd-form sum", getattr(args, "mgd_form", "sum") == "sum", {"loss_factor"}),
        ("--mgd-form mean or relative", getattr(args, "mgd_form", "sum") != "sum", {"mgd_weight"}),
        ("--warmup 1", bool(args.warmup), {"warmup_epochs"}),
        ("a run without --resume", not args.resume, {"start_epoch"}),
    ]
    for needed, present, names in rules:
        for name in sorted(names & set(typed)):
            if not present:
                raise UserError(f"{typed[name]} has no effect here: it goes with {needed}")


def _recipe_words(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """Turn a recipe into the words that one would type, so that both are checked by the same parser."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} must be a mapping of option names to values")
    flags = {o: action for action in parser._actions for o in action.option_strings if o.startswith("--")}
    words: list[str] = []
    for key, value in content.items():
        option = "--" + str(key).replace("_", "-")
        if option not in flags or option in ("--help", "--config"):
            near = difflib.get_close_matches(option, flags, n=3)
            hint = f"; close ones are {', '.join(n[2:] for n in near)}" if near else ""
            raise UserError(f"recipe {path}: unknown key {key!r}{hint}")
        if flags[option].nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"recipe {path}: {key} must be true or false; got {value!r}")
            words += [option] if value else []
        elif value is None or isinstance(value, dict):
            raise UserError(f"recipe {path}: {key} needs a value; got {value!r}")
        else:
            words += [option, *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return words


def _check(args: Namespace, distillation: bool) -> None:
    if args.start_epoch >= total_epochs(args):
        raise UserError(f"--start-epoch {args.start_epoch} leaves nothing to do: epochs end at {total_epochs(args)}")
    if args.lr_drop_epochs != sorted(args.lr_drop_epochs):
        raise UserError(f"--lr-drop-epochs must rise; got {args.lr_drop_epochs}")
    if args.resume and args.output and Path(args.output).resolve() != Path(args.resume).resolve().parent:
        raise UserError("--resume goes on in the folder of its file: leave --output out")
    if (args.pretrained or args.use_pretrained) and args.student_resume:
        raise UserError("--student-resume and pretrained weights exclude each other")
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
    if args.sync_bn and not on_gpu:
        raise UserError("--sync-bn 1 needs GPUs: torch has no CPU form of it")
    if args.sync_bn and not (args.world_size > 1 or args.multiprocessing_distributed or "RANK" in os.environ):
        raise UserError("--sync-bn 1 needs several ranks: --multiprocessing-distributed, --world-size or torchrun")
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


def _check_distillation(args: Namespace) -> None:
    names = args.distiller.split("+")
    unknown = [name for name in names if name not in ("mgd", "kd")]
    if unknown or len(set(names)) < len(names):
        raise UserError(f"unknown distiller {args.distiller!r}: use mgd, kd or mgd+kd")
    if args.mgd_with_kd and "mgd" not in names:
        raise UserError("--mgd-with-kd 1 goes with --distiller mgd")
    if args.mgd_reducer == "sm" and args.mgd_capacity not in (None, "single"):
        raise UserError(f"--mgd-reducer sm matches one to one: --mgd-capacity {args.mgd_capacity} does not go with it")
    args.mgd_capacity = args.mgd_capacity or ("single" if args.mgd_reducer == "sm" else "spread")
    if args.mgd_with_kd and "kd" not in names:
        args.distiller += "+kd"
    if args.kd_temperature is None:
        args.kd_temperature = 1.5 if "mgd" in names else 4.0
    if args.taps and (args.student_taps or args.teacher_taps):
        raise UserError("--taps names the paths of both networks: leave --student-taps and --teacher-taps out")
    args.student_taps, args.teacher_taps = args.student_taps or args.taps, args.teacher_taps or args.taps


def total_epochs(args: Namespace) -> int:
    """Return how many epochs there are, those of the warmup included."""
    return int(args.epochs + (args.warmup_epochs if args.warmup else 0))


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


def mgd_weight(args: Namespace, epoch: int) -> float:
    """Return the weight of the mgd term in `epoch`: constant, or falling to 0 by a line or half a cosine."""
    weight = 1 / args.loss_factor if args.mgd_form == "sum" else args.mgd_weight
    part = epoch / total_epochs(args)
    falling = {"constant": 1.0, "linear": 1 - part, "cosine": 0.5 * (1 + math.cos(math.pi * part))}
    return float(weight * falling[args.mgd_schedule])


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
        "options": {name: value for name, value in vars(args).items() if name != "command"},
        "versions": versions,
        "commit": _commit(),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
    }


def _commit() -> str | None:
    try:
        where = Path(__file__).parent
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
