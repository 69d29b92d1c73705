"""The words of `mgd evaluate`, turned into those of --evaluate of the main scripts; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from classification.errors import UserError
from classification.options.fields import Option
from classification.options.options import all_options
from classification.options.parser import Parser, add_option
from classification.paths import is_file, is_folder

# What --evaluate looks at beside what is declared as `reading`, and what else it calls by words of its own.
ABOUT = {
    "output": "folder of evaluation.json; default: that of the checkpoint",
    "arch": "the network, if the checkpoint does not name it",
    "teacher_arch": "the teacher's network, if its checkpoint does not name it",
    "img_size": "height and width of the images in pixels; default: that of each checkpoint",
    "num_classes": "number of classes, for lists; default: the number of class folders, or the largest label + 1",
    "batch_size": "images per batch",
}
EXAMPLE = "example: mgd evaluate runs/student photos --teacher runs/teacher"


def build(prog: str) -> Parser:
    """Return the parser."""
    parser = Parser(
        prog,
        description="Measure the accuracy of a network on DIR/valid, and compare it with a teacher.",
        epilog=EXAMPLE,
        allow_abbrev=False,
        usage=f"{prog} CHECKPOINT DIR [--teacher CHECKPOINT] [options]",
    )
    about = "a best.pth, another file of weights, or a run folder"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=about)
    parser.add_argument("data", metavar="DIR", help="folder of photographs: valid/CLASS/*.jpg")
    parser.add_argument(
        "--teacher",
        metavar="CHECKPOINT",
        action="append",
        default=[],
        help="a network to compare with; may be given several times",
    )
    for option in _options():
        add_option(parser, option)
    return parser


def _options() -> list[Option]:
    known = [option for option in all_options(distillation=False) if option.reading or option.name in ABOUT]
    return [replace(option, help=ABOUT.get(option.name, option.help)) for option in known if option.name != "data"]


def translate(words: Sequence[str], prog: str) -> tuple[str, list[str]]:
    """Return the script that evaluates, and its words.

    Args:
        words: what was typed.
        prog: the name of the command, for its help.

    Raises:
        UserError: a mistake in them.
    """
    args = build(prog).parse_intermixed_args(list(words))
    teachers = [_file(path) for path in args.teacher]
    found = [args.data, "--evaluate", "--student-resume", _file(args.checkpoint)]
    if teachers:
        found += ["--teacher-resume", ",".join(teachers)]
    for option in _options():
        value = getattr(args, option.name)
        if value != (list(option.default) if isinstance(option.default, tuple) else option.default):
            found += [option.flags[-1], str(value)]
    # Of several teachers main_base.py knows nothing.
    return ("main_mgd" if len(teachers) > 1 else "main_base"), found


def _file(path: str) -> str:
    """Return the best.pth of a run folder, or the file that is named."""
    if not is_folder(path):
        return path
    best = Path(path, "best.pth")
    if not is_file(best):
        raise UserError(f"{path} has no best.pth: give a file of weights, or the folder of a run")
    return str(best)
