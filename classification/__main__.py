"""The command `mgd`, also python -m classification: one subcommand per task, which calls the script of that task."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from classification.errors import UserError
from classification.options import evaluating
from classification.options.first_look import write_any_name
from classification.paths import is_file
from classification.system.exit_status import attempt

PROG = "mgd"


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Args:
        module: its script, a file of this package; without that file, there is no such command.
        about: the task in a line.
        before: arguments in front of those that are typed.
        after: arguments behind them.
        translate: turns what is typed into (script, its arguments), instead of the above.
    """

    module: str
    about: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    translate: Callable[[Sequence[str], str], tuple[str, list[str]]] | None = None

    @property
    def installed(self) -> bool:
        """Whether the script is part of this installation."""
        return is_file(Path(__file__).with_name(f"{self.module}.py"))


COMMANDS = {
    "prepare": Command("prepare", "make a data folder out of photographs"),
    "train": Command("main_base", "train one network alone, for example a teacher"),
    "distill": Command("main_mgd", "distil a student from a teacher"),
    "taps": Command("main_mgd", "show where student and teacher are tapped", after=("--show-taps",)),
    "evaluate": Command(
        "main_base", "measure the accuracy of a network, and compare it with a teacher", translate=evaluating.translate
    ),
    "compare": Command("compare", "train in several ways at equal budget, and say which is better"),
    "report": Command("report", "write a page about runs"),
    "predict": Command("predict", "classify images"),
    "export": Command("export", "write a network as a file for other programs: onnx, int8, pt2, safetensors"),
    "score": Command("pseudo_label", "score images without labels with a teacher", before=("score",)),
    "select": Command("pseudo_label", "choose the best of the scored images", before=("select",)),
    "reinforce": Command("reinforce", "store a teacher's outputs, to train without it"),
    "semi": Command("semi_supervised", "learn from labelled and unlabelled images, and compare with the labels alone"),
}


def screen() -> str:
    """Return the help text."""
    commands = {name: command for name, command in COMMANDS.items() if command.installed}
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {command.about}" for name, command in commands.items()]
    return "\n".join(
        [
            f"usage: {PROG} COMMAND ...",
            "",
            "Distil a small image classifier from a large one.",
            "",
            *lines,
            "",
            f"{PROG} COMMAND --help shows the options of a command. Example:",
            f"  {PROG} train photos --arch resnet18 --img-size 128 --epochs 20 --output runs/teacher",
            f"  {PROG} distill photos --arch mobilenet_v1 --teacher-resume runs/teacher/best.pth --output runs/student",
            f"  {PROG} evaluate runs/student photos --teacher runs/teacher",
        ]
    )


def find(typed: str) -> Command:
    """Return the subcommand that was typed.

    Raises:
        UserError: there is no such command; it names close ones.
    """
    commands = {name: command for name, command in COMMANDS.items() if command.installed}
    if typed in commands:
        return commands[typed]
    near = difflib.get_close_matches(typed, commands, n=3, cutoff=0.5)
    hint = f"close ones are {', '.join(near)}" if near else f"there are {', '.join(commands)}"
    raise UserError(f"unknown command {typed!r}; {hint}")


def run(words: Sequence[str]) -> int:
    """Do what was typed; return the exit status of its script.

    Raises:
        UserError: a mistake in the command, or in what its translation reads.
    """
    command, typed = find(words[0]), words[1:]
    script, given = command.module, [*command.before, *typed, *command.after]
    if command.after and {"-h", "--help"} & set(typed):
        print(f"{PROG} {words[0]}: {command.about}, as {PROG} distill {' '.join(command.after)}.\n", flush=True)
    if command.translate is not None:
        script, given = command.translate(typed, f"{PROG} {words[0]}")
    main: Callable[[list[str], str], int] = importlib.import_module(f"classification.{script}").main
    return main(given, PROG if command.before else f"{PROG} {words[0]}")


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; return the exit status."""
    write_any_name()
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        status = attempt(lambda: print(screen(), file=sys.stdout if words else sys.stderr, flush=True), PROG)
        return status if words else 2
    try:
        return run(words)
    except UserError as error:
        prog = f"{PROG} {words[0]}" if words[0] in COMMANDS else PROG
        print(f"{prog}: {error}", file=sys.stderr, flush=True)
        return 2
    except SystemExit:  # a help text was printed
        return 0


if __name__ == "__main__":
    sys.exit(main())
