"""The parser of the main scripts, built from the fields that declare their options."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Container, Iterable
from typing import Any, NoReturn

from classification.errors import UserError
from classification.options.fields import Option
from classification.options.options import all_options


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are `UserError`s, with the nearest option names."""

    def error(self, message: str) -> NoReturn:
        options = [option for action in self._actions for option in action.option_strings]
        for word in message.split() if message.startswith("unrecognized") else ():
            if word.startswith("-"):
                near = difflib.get_close_matches(word.split("=")[0], options, n=3)
                message += f"; close ones are {', '.join(near)}" if near else f"; see {self.prog} --help"
        raise UserError(message)


class _Help(argparse.HelpFormatter):
    """Help that adds the default where the text does not mention it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_default = action.default in (None, "", []) or action.nargs == 0 or "default" in str(action.help)
        return action.help if says_default else f"{action.help} (default: %(default)s)"


def add_option(group: argparse._ActionsContainer, option: Option) -> None:
    """Add a declared option to a parser, or to a group of one."""
    about: dict[str, Any] = {"help": option.help, "default": option.default}
    if option.is_flag:
        about["action"] = "store_true"
    else:
        about |= {"metavar": option.metavar, "choices": option.choices, "type": option.kind}
        if option.repeats:
            about["action"] = "append"
        elif option.nargs:
            about["nargs"] = option.nargs
    if isinstance(option.default, tuple):
        about["default"] = list(option.default)
    if option.flags:
        about["dest"] = option.name
    group.add_argument(*(option.flags or (option.name,)), **about)


# The options of a first run, and an example.
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


def script_of(options: Container[str]) -> str:
    """Return the name of the script that has these options."""
    return "main_mgd.py" if "distiller" in options else "main_base.py"


def build_parser(prog: str, *, distillation: bool) -> Parser:
    """Return the parser of `main_mgd.py` (with `distillation`) or `main_base.py`, called by the name `prog`."""
    what = "Distil a student from a teacher" if distillation else "Train or evaluate one network"
    parser = Parser(
        prog=prog,
        usage="%(prog)s DIR [options]",
        description=f"{what} on a folder of photographs.",
        formatter_class=_Help,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument(
        "-h", "--help", action=_FirstHelp, nargs=0, default=argparse.SUPPRESS, help="show the options of a first run"
    )
    parser.add_argument("--help-all", action="help", default=argparse.SUPPRESS, help="show all options, group by group")
    add_options(parser, all_options(distillation=distillation))
    return parser


def add_options(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    """Add options to a parser, those of a section side by side."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in options:
        if option.section not in groups:
            groups[option.section] = parser.add_argument_group(option.section)
        add_option(groups[option.section], option)


def typed_words(parser: argparse.ArgumentParser, values: argparse.Namespace, options: Iterable[Option]) -> list[str]:
    """Return the words of the options whose values are not their defaults, for a command that has them too."""
    words: list[str] = []
    for option in options:
        value = getattr(values, option.name)
        if value == parser.get_default(option.name):
            continue
        flag = option.flags[-1]
        if option.is_flag:
            words.append(flag)
        elif isinstance(value, list):
            words += [f"{flag}={one}" for one in value] if option.repeats else [flag, *map(str, value)]
        else:
            words.append(f"{flag}={value}")
    return words
