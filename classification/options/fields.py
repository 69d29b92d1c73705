"""Options as fields of frozen dataclasses: each field declares its spelling, its check and its help."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

Kind = Callable[[str], Any]  # turns a word into a value, or raises `argparse.ArgumentTypeError`


@dataclass(frozen=True)
class Option:
    """One option: its default, help and check, and when it may change.

    Args:
        default: its value where none is given. False: a flag, which takes no word and sets True.
        flags: its spellings; none for a positional argument.
        help: one line.
        kind: the check of its word; None for text.
        choices: the values that it takes, where these are few.
        metavar: the name of its word in the help.
        nargs: how many words it takes, as argparse writes it; None for one.
        section: its title in --help-all, where that is not its group's.
        distillation: whether main_mgd.py alone has it.
        free: whether a resumed run may have another value, because it does not change the result.
        anew: whether each command sets it, so that a resumed run does not take it from its checkpoint.
        reading: whether an evaluation takes it from the run that it evaluates: which images, and how they are read.
        file: whether it names a file or folder, so that an empty string (an unset shell variable) is an error.
        place: whether it is a path of images, relative to the folder where the run was started.
        name: the name of its field.
    """

    default: Any
    flags: tuple[str, ...]
    help: str
    kind: Kind | None = None
    choices: tuple[Any, ...] | None = None
    metavar: str | None = None
    nargs: str | None = None
    section: str = ""
    distillation: bool = False
    free: bool = False
    anew: bool = False
    reading: bool = False
    file: bool = False
    place: bool = False
    name: str = ""

    @property
    def is_flag(self) -> bool:
        """Whether it takes no word."""
        return self.default is False

    @property
    def repeats(self) -> bool:
        """Whether it may be typed several times; each adds a value."""
        return self.default == () and self.nargs is None


def option(default: Any, *flags: str, positional: bool = False, **about: Any) -> Any:
    """Declare a field as an option; its flag is --NAME where none is given. See `Option`."""
    made = Option(default, flags, **about)
    return field(default=default, metadata={"option": made, "positional": positional})


def switch(default: int | None, *flags: str, **about: Any) -> Any:
    """Declare an option that is 0 or 1."""
    return option(default, *flags, kind=int, choices=(0, 1), **about)


def declared(group: Any) -> Iterator[Option]:
    """Yield the options that the fields of a dataclass declare, in order; fields without one are left out."""
    for entry in fields(group):
        if "option" not in entry.metadata:
            continue
        usual = () if entry.metadata["positional"] else ("--" + entry.name.replace("_", "-"),)
        found: Option = entry.metadata["option"]
        yield replace(found, name=entry.name, flags=found.flags or usual)


def number(kind: type, low: float, high: float = math.inf, *, open_low: bool = False) -> Kind:
    """Return the check of a finite number in [low, high], or above `low` with `open_low`."""

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


def switched(no: str, yes: str) -> Kind:
    """Return the check of a word, in which 0 and false, 1 and true may stand for two of the words."""
    short = {"0": no, "false": no, "1": yes, "true": yes}
    return lambda text: short.get(text.lower(), text)


count = number(int, 1)
whole = number(int, 0)
positive = number(float, 0, open_low=True)
nonnegative = number(float, 0)
