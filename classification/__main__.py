"""The word `mgd` on the shell, also python -m classification: one word per task, each over the script of that task."""

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
class Word:
    """A task.

    Args:
        module: its script, a file of this package; a word without one is not there.
        about: the task in a line.
        before: words in front of those that are typed.
        after: words behind them.
        translate: turns what is typed into (script, its words), in the place of the above.
    """

    module: str
    about: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    translate: Callable[[Sequence[str], str], tuple[str, list[str]]] | None = None

    @property
    def there(self) -> bool:
        """Whether the script is part of this installation."""
        return is_file(Path(__file__).with_name(f"{self.module}.py"))


WORDS = {
    "prepare": Word("prepare", "make a data folder out of photographs"),
    "train": Word("main_base", "train one network by itself, as a teacher"),
    "distill": Word("main_mgd", "distil a student from a teacher"),
    "taps": Word("main_mgd", "show where student and teacher would be tapped", after=("--show-taps",)),
    "evaluate": Word("main_base", "measure a network, and its teacher beside it", translate=evaluating.translate),
    "compare": Word("compare", "train several ways at equal budget, and say which is better"),
    "report": Word("report", "write a page about runs"),
    "predict": Word("predict", "say what is on images"),
    "export": Word("export", "write a network for other programs: onnx, int8, pt2, safetensors"),
    "score": Word("pseudo_label", "score images without labels by a teacher", before=("score",)),
    "select": Word("pseudo_label", "choose the best of the scored images", before=("select",)),
    "reinforce": Word("reinforce", "store a teacher's outputs, to train without it"),
    "semi": Word("semi_supervised", "learn from labelled and unlabelled images in four steps"),
}


def screen() -> str:
    """Return the help text."""
    words = {name: word for name, word in WORDS.items() if word.there}
    width = max(map(len, words))
    lines = [f"  {name:<{width}}  {word.about}" for name, word in words.items()]
    return "\n".join(
        [
            f"usage: {PROG} WORD ...",
            "",
            "Distil a small image classifier from a large one.",
            "",
            *lines,
            "",
            f"{PROG} WORD --help shows the options of a word. Example:",
            f"  {PROG} train photos --arch resnet18 --img-size 128 --epochs 20 --output runs/teacher",
            f"  {PROG} distill photos --arch mobilenet_v1 --teacher-resume runs/teacher/best.pth --output runs/student",
            f"  {PROG} evaluate runs/student photos --teacher runs/teacher",
        ]
    )


def find(typed: str) -> Word:
    """Return the word that was typed.

    Raises:
        UserError: there is no such word; it names close ones.
    """
    words = {name: word for name, word in WORDS.items() if word.there}
    if typed in words:
        return words[typed]
    near = difflib.get_close_matches(typed, words, n=3, cutoff=0.5)
    hint = f"close ones are {', '.join(near)}" if near else f"there are {', '.join(words)}"
    raise UserError(f"there is no word {typed!r}; {hint}")


def run(words: Sequence[str]) -> int:
    """Do what was typed; return the exit status of its script.

    Raises:
        UserError: a mistake in the word, or in what its translation reads.
    """
    word, typed = find(words[0]), words[1:]
    script, given = word.module, [*word.before, *typed, *word.after]
    if word.translate is not None:
        script, given = word.translate(typed, f"{PROG} {words[0]}")
    main: Callable[[list[str], str], int] = importlib.import_module(f"classification.{script}").main
    return main(given, PROG if word.before else f"{PROG} {words[0]}")


def main(argv: list[str] | None = None) -> int:
    """Run a word; return the exit status."""
    write_any_name()
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        status = attempt(lambda: print(screen(), file=sys.stdout if words else sys.stderr, flush=True), PROG)
        return status if words else 2
    try:
        return run(words)
    except UserError as error:
        prog = f"{PROG} {words[0]}" if words[0] in WORDS else PROG
        print(f"{prog}: {error}", file=sys.stderr, flush=True)
        return 2
    except SystemExit:  # a help text was printed
        return 0


if __name__ == "__main__":
    sys.exit(main())
