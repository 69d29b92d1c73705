"""Every option of the main scripts, its kind and its default."""

from __future__ import annotations

import argparse
import difflib
import math
import os
from collections.abc import Callable
from typing import Any, NoReturn

from classification.errors import UserError
from classification.options.names import ASSIGNMENTS, FORMS, LARGEST_SIZE, SOLVERS


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are `UserError`s, with the nearest option names."""

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.split() if message.startswith("unrecognized") else ():
            if word.startswith("-"):
                near = difflib.get_close_matches(word.split("=")[0], known, n=3)
                message += f"; close ones are {', '.join(near)}" if near else f"; see {self.prog} --help"
        raise UserError(message)


class _Help(argparse.HelpFormatter):
    """Help that names the default where there is one and the text does not speak of it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default in (None, "", []) or action.nargs == 0 or "default" in str(action.help)
        return action.help if told else f"{action.help} (default: %(default)s)"


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


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("photographs and run").add_argument
    add(
        "data",
        metavar="DIR",
        nargs="?",
        help="folder of photographs: train/CLASS/*.jpg and valid/CLASS/*.jpg (or val/); with --resume, the run's own",
    )
    add("--train-list", metavar="FILE", help="list of `path label` lines that takes the place of train/")
    add("--valid-list", metavar="FILE", help="the same for valid/; with both, labels are the class names")
    add("--config", metavar="FILE", help="recipe: a YAML mapping of option names to values; the command line wins")
    add(
        "-a",
        "--arch",
        help="the network to train: a name, torchvision:NAME or timm:NAME; default: that of the file in "
        "--student-resume, or resnet18",
    )
    add(
        "--num-classes",
        type=_number(int, 1, 1_000_000),
        help="default: the number of class folders in train/, or largest label + 1",
    )
    add(
        "--img-size",
        type=_number(int, 8, LARGEST_SIZE),
        help="side of the square the networks see, in pixels; default: that of each network's weights, or 224",
    )
    add("--output", metavar="FOLDER", help="run folder; default: a new one under runs/")
    add("--epochs", type=_count, default=100, help="epochs of training, those of the warmup not counted")
    add("--start-epoch", type=_whole, default=0, help="epoch to begin with, counted from 0")
    add("-b", "--batch-size", type=_count, default=256, help="images a step, over all devices and ranks together")
    add(
        "--accumulate",
        type=_count,
        default=1,
        metavar="N",
        help="pass each batch in N parts, to save memory; batch norms and terms see the parts",
    )
    add(
        "--resume",
        metavar="RUN",
        default="",
        help="resume a run: its folder, or the last.pth in it; what is not typed is as the run had it; auto: that in "
        "--output, if there is one, with the options that are typed",
    )
    add(
        "--resume-override", type=int, choices=(0, 1), default=0, help="1: go on though other options change the result"
    )
    add("--checkpoint-every-steps", type=_count, metavar="N", help="write last.pth every N steps, beside every epoch")
    add("--skip-nonfinite", type=_whole, default=0, metavar="N", help="steps left out where the loss is not finite")
    add("-e", "--evaluate", action="store_true", help="evaluate and leave")
    add("-p", "--print-freq", type=_count, metavar="N", help="print every N steps; default: about every 10 seconds")
    add(
        "--seed",
        type=_number(int, 0, 2**31 - 1),
        help="seed of everything random; default: a fresh one, written to config.json",
    )
    add(
        "-j",
        "--workers",
        type=_number(int, 0, 1024),
        default=min(8, os.cpu_count() or 1),
        help="loading processes, shared by the ranks that one command starts",
    )
    add(
        "--bad-images",
        choices=("stop", "skip"),
        default="stop",
        help="stop at an image that cannot be read, or read all first, leave such images out and list them",
    )
    add("--cache", choices=("off", "ram"), default="off", help="ram: decode every image once and keep it in memory")
    add("--channels-last", type=int, choices=(0, 1), default=1, help="memory layout of maps: 1 is faster nearly always")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add(
        "--optimizer",
        choices=("sgd", "muon"),
        default="sgd",
        help="muon: orthogonal steps of convolutions; begin with --lr 0.03 --wd 0.05",
    )
    add("--lr", "--learning-rate", type=_positive, default=0.1, help="learning rate")
    add("--momentum", type=_number(float, 0, 0.9999), default=0.9, help="Nesterov momentum")
    add("--wd", "--weight-decay", dest="weight_decay", type=_nonnegative, default=1e-4, help="weight decay")
    add("--lr-schedule", choices=("step", "cosine"), default="step", help="drops at epochs, or half a cosine to 0")
    add("--lr-drop-ratio", type=_positive, default=0.1, help="step: factor at every drop")
    add("--lr-drop-epochs", type=_count, nargs="+", default=[31, 61, 81], help="step: epochs of the drops")
    add("--warmup", type=int, choices=(0, 1), default=0, help="1: linear warmup from 0.1 of the rate, added in front")
    add("--warmup-epochs", type=_count, default=10, help="epochs that --warmup 1 adds in front")
    add("--labels", type=int, choices=(0, 1), help="0: train/ holds images without labels; default: by the terms")
    add("--label-smoothing", type=_number(float, 0, 0.9999), help="of the cross-entropy, in [0, 1); default: 0")
    add(
        "--train-crop",
        choices=("resized", "pad"),
        help="pad: images fill the frame already (CIFAR); default: resized",
    )
    add("--hflip", type=int, choices=(0, 1), default=1, help="0: no mirrored images (digits, text)")
    add("--mixup", type=_nonnegative, default=0.0, metavar="ALPHA", help="mix pairs of images; 0.2 is usual, 0 is off")
    add("--cutmix", type=_nonnegative, default=0.0, metavar="ALPHA", help="paste parts of images; 1 is usual, 0 is off")
    add(
        "--ema",
        type=_number(float, 0, 0.999999),
        default=0.0,
        metavar="DECAY",
        help="evaluate and keep an average of the student over its steps; 0.999 to 0.9999 is usual, 0 is off",
    )
    add("--compile", type=int, choices=(0, 1), default=0, help="1: torch.compile; slow to start")


def _add_networks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("weights and teachers").add_argument
    add("--pretrained", action="store_true", help="start from the published ImageNet weights")
    add("--use-pretrained", type=int, choices=(0, 1), default=0, help="1: the same as --pretrained")
    add("--student-resume", metavar="FILE", help="weights to evaluate, or to start from, with another head if need be")
    add(
        "--teacher-arch",
        help="the teacher's network, or several, comma-separated; default: that of its file, or resnet50 (resnet152 "
        "for the student resnet50); with dml, the student's peers, kept as peer1.pth, best_peer1.pth ...; default: one "
        "more of the student",
    )
    add("--teacher-resume", metavar="FILE", help="weights of the teacher, or of each, comma-separated")


def _add_devices(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("devices").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--gpu", type=_whole, help="use this GPU only")
    add(
        "--amp",
        choices=("off", "bf16", "fp16"),
        default="off",
        help="mixed precision; bf16 runs anywhere (in float32 where the device lacks it), fp16 on GPUs",
    )
    add("--world-size", type=int, default=-1, help="nodes (with --multiprocessing-distributed), or else ranks")
    add("--rank", type=int, default=-1, help="number of this node, or of this rank")
    add("--dist-url", default="tcp://127.0.0.1:23456", help="where rank 0 listens; env:// takes the environment's")
    add("--dist-backend", choices=("nccl", "gloo"), help="how ranks talk; default: nccl on GPUs, gloo on CPUs")
    add("--multiprocessing-distributed", action="store_true", help="one process per GPU of this node")
    add(
        "--deterministic",
        type=int,
        choices=(0, 1),
        default=0,
        help="1: the same bits on the same GPU, at some cost in speed; the CPU gives them anyway",
    )
    add("--sync-bn", type=int, choices=(0, 1), default=0, help="1: batch statistics over all GPUs of a DDP run")


def _add_terms(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("terms").add_argument
    add("--distiller", default="mgd", help="a term, or a sum of terms as mgd+kd; cross-entropy is added to it")
    add(
        "--term",
        action="append",
        metavar="NAME.KEY=VALUE",
        default=[],
        help="a term's weight, warmup, start, stop, decay or hyper-parameter, as dkd.beta=2; repeatable, and wins",
    )
    add("--term-module", metavar="FILE", help="a Python file with terms of your own: TERMS = {name: term class}")
    add("--calibrate", type=_count, metavar="STEPS", help="print weights that balance the terms' gradients, and leave")
    add("--kd-weight", type=_nonnegative, help="factor of the kd term; default: 1")
    add("--kd-temperature", type=_positive, help="softens both networks' logits; default: 1.5 beside mgd, 4 alone")


def _add_matching(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("matching guided distillation").add_argument
    add("--loss-factor", type=_positive, help="form sum: mgd is divided by it; default: 10000, which suits 224 px")
    add(
        "--mgd-form",
        choices=FORMS,
        help="sum, the default, as published; mean: per element, for every image size; relative: to the teacher's maps",
    )
    add("--mgd-weight", type=_nonnegative, help="forms mean and relative: factor of the mgd term; default: 5")
    add(
        "--mgd-assignment",
        choices=ASSIGNMENTS,
        help="which flow; all except cheapest, the default, are controls that show what matching is worth",
    )
    add("--mgd-reducer", choices=("amp", "rd", "sp", "sm"), help="how teacher channels become one target; default: amp")
    add("--mgd-update-freq", type=_whole, help="epochs between two matchings; 0: once, before training; default: 2")
    add("--mgd-with-kd", type=int, choices=(0, 1), default=0, help="1: the same as --distiller mgd+kd")
    add(
        "--mgd-capacity",
        choices=("spread", "truncate", "reference", "single"),
        help="how many teacher channels guide one; default: spread, for sm single",
    )
    add("--mgd-solver", choices=("auto", *SOLVERS), help="exact solver of the flow; default: auto, the fastest")
    add(
        "--mgd-observe",
        choices=("pass", "online"),
        help="how costs are measured: pass, the default, before a matching; online: on a share of each training batch, "
        "except for the first matching",
    )
    add(
        "--mgd-max-images",
        type=_count,
        help="images observed for a matching; default: 20000",
    )
    add(
        "--mgd-margin",
        choices=("bn", "map", "none"),
        help="bn, the default: from the norm before the tap, or else map",
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("frozen teachers and taps").add_argument
    add(
        "--teacher-dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="number type of the frozen teacher; auto: bfloat16 where the device computes in it, else that of --amp",
    )
    add(
        "--compile-student",
        type=int,
        choices=(0, 1),
        help="with --compile 1: whether the student is translated too, or teachers and matching alone; default: on a "
        "GPU only: on a CPU it makes small ResNets faster and MobileNets slower",
    )
    add(
        "--teacher-threads",
        type=_whole,
        default=0,
        help="on a CPU: threads on which the teachers compute the next batch while the student trains on the others; "
        "0: in turn, each on all. Half of the cores is a good start",
    )
    add(
        "--teacher-mean",
        choices=("terms", "probabilities"),
        default="terms",
        help="several teachers: mean of each term over them, or each term against the mean of their probabilities",
    )
    add("--student-taps", metavar="PATHS", help="comma-separated, as layer2.1.relu@in#-1; default: by family")
    add("--teacher-taps", metavar="PATHS", help="the same for the teacher; for several, separated by ;")
    add("--taps", metavar="PATHS", help="the same paths for student and teacher")


# The options of a first run, and what one types then.
FIRST = {
    False: (
        "arch", "pretrained", "img_size", "epochs", "batch_size", "lr", "amp", "output", "resume", "evaluate",
    ),
    True: (
        "arch", "teacher_resume", "distiller", "config", "img_size", "epochs", "batch_size", "lr", "output", "resume",
    ),
}  # fmt: skip
EXAMPLES = {
    False: "%(prog)s photos --arch resnet18 --img-size 128 --epochs 20 --output runs/teacher",
    True: "%(prog)s photos --arch mobilenet_v1 --teacher-resume runs/teacher/best.pth --distiller mgd+kd",
}


class _FirstHelp(argparse.Action):
    """Print the options of a first run and an example, a screen in all, and leave."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        distillation = any(action.dest == "distiller" for action in parser._actions)
        formatter = _Help(parser.prog, max_help_position=30, width=100)
        formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
        formatter.add_text(parser.description)
        formatter.start_section("options of a first run")
        dests = FIRST[distillation]
        first = [action for action in parser._actions if action.dest in (*dests, "data", "help_all")]
        formatter.add_arguments(sorted(first, key=lambda action: ("data", *dests, "help_all").index(action.dest)))
        formatter.end_section()
        formatter.add_text(f"example: {EXAMPLES[distillation]}")
        print(formatter.format_help(), end="")
        parser.exit()


def build_parser(prog: str, *, distillation: bool) -> Parser:
    """Return the parser of `main_mgd.py` (with `distillation`) or `main_base.py`."""
    what = "Distil a student from a teacher" if distillation else "Train or evaluate one network"
    parser = Parser(
        prog=prog,
        usage="%(prog)s DIR [options]",
        description=f"{what} on a folder of photographs.",
        formatter_class=_Help,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=_FirstHelp, nargs=0, default=argparse.SUPPRESS, help="show a screen")
    parser.add_argument(
        "--help-all", action="help", default=argparse.SUPPRESS, help="show every option, group by group, and leave"
    )
    for add in (_add_run, _add_training, _add_networks, _add_devices):
        add(parser)
    if distillation:
        for add in (_add_terms, _add_matching, _add_reading):
            add(parser)
    return parser
