"""Recipes: YAML files that hold options under their names, and student, teachers and terms as nested mappings."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from classification.errors import UserError, quoted
from classification.options.names import LARGEST_SIZE
from classification.options.strict_yaml import read_yaml
from classification.options.terms import is_number
from classification.paths import exists, is_file

RECIPES = Path(__file__).parents[1] / "recipes"
LONGEST = 1 << 16  # bytes; ours have hundreds
STUDENT = {"arch": "--arch", "resume": "--student-resume", "pretrained": "--pretrained"}
# What a teacher takes: which values, and how to say so.
TEACHER: dict[str, tuple[Callable[[Any], bool], str]] = {
    "arch": (lambda v: isinstance(v, str), "a name"),
    "resume": (lambda v: isinstance(v, str), "a file"),
    "weights": (lambda v: isinstance(v, str), "a name"),
    "weight": (lambda v: is_number(v) and v > 0, "a number above 0"),
    "img_size": (lambda v: is_number(v) and isinstance(v, int) and 8 <= v <= LARGEST_SIZE, "a number of pixels"),
    "mean": (lambda v: isinstance(v, list) and len(v) == 3 and all(map(is_number, v)), "three numbers"),
    "std": (lambda v: isinstance(v, list) and len(v) == 3 and all(is_number(x) and x > 0 for x in v),
            "three numbers above 0"),
    "frozen": (lambda v: isinstance(v, bool), "true or false"),
}  # fmt: skip

Recipe = tuple[list[str], dict[str, Any], dict[str, str]]


def read_recipe(parser: argparse.ArgumentParser, path: Path, distillation: bool) -> Recipe:
    """Read a recipe as the words that one would type, so that both are checked by the same parser.

    Args:
        parser: the parser whose options it may hold.
        path: the file, or the name of a recipe of this project.
        distillation: whether it may hold `teachers` and `terms`.

    Returns:
        The words; what has no option: {"terms": {name: {key: value}}, "teachers": [{key: value}]}; and how the recipe
        calls each option that it gives, {destination: key}.

    Raises:
        UserError: a file that is not such a mapping, an unknown key.
    """
    content = _read(path)
    try:
        given = _student(content.pop("student", {}))
        nested: dict[str, Any] = {}
        if distillation:
            for key, option in (("terms", "distiller"), ("teachers", "teacher_arch")):
                if key in content and {option, option.replace("_", "-")} & set(content):
                    raise UserError(f"{key} and {option} say the same: leave one out")
            for key in ("terms", "teachers"):
                if key in content and not content[key]:
                    raise UserError(f"{key} is empty: leave it out, or name one")
            nested["teachers"] = _teachers(content.pop("teachers", []))
            nested["terms"] = _terms(content.pop("terms", {}))
        words, keys = _words(parser, [*given, *_options(parser, content)])
        return words, nested, keys
    except UserError as error:
        raise UserError(f"recipe {path}: {error}") from error


def _file_of(path: Path) -> Path:
    """Return the file itself, or that of a recipe of this project where a bare name is given."""
    own = RECIPES / f"{path}.yaml"
    return own if path.name == str(path) and not exists(path) and is_file(own) else path


def _near(path: Path) -> str:
    """Return a hint at the recipes of this project whose names are close."""
    near = difflib.get_close_matches(path.stem, [own.stem for own in RECIPES.glob("*.yaml")], n=2)
    return f"; close ones of this project are {', '.join(near)}" if near and not exists(path) else ""


def _read(path: Path) -> dict[Any, Any]:
    try:
        with _file_of(path).open("rb") as file:
            text = file.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise ValueError(f"it is longer than {LONGEST} bytes")
        content = read_yaml(text.decode())
    except UserError as error:
        raise UserError(f"recipe {path} is not YAML that recipes allow: {error}") from error
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        cause = "it is not text in UTF-8" if isinstance(error, UnicodeDecodeError) else cause
        raise UserError(f"recipe {path} cannot be read: {cause}{_near(path)}") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} must be a mapping of option names to values; got {quoted(content)}")
    return content


Given = tuple[str, str, Any]  # option, how the recipe calls it, value


def _options(parser: argparse.ArgumentParser, content: dict[Any, Any]) -> list[Given]:
    flags = {o for action in parser._actions for o in action.option_strings if o.startswith("--")}
    flags -= {"--help", "--help-all", "--config", "--term-module"}  # no recipe brings code along
    given = []
    for key, value in content.items():
        option = "--" + str(key).replace("_", "-")
        if option not in flags:
            near = difflib.get_close_matches(option, flags, n=3)
            hint = f"; close ones are {', '.join(n[2:] for n in near)}" if near else ""
            raise UserError(f"unknown key {quoted(key)}{hint}")
        given.append((option, str(key), value))
    return given


def _words(parser: argparse.ArgumentParser, given: list[Given]) -> tuple[list[str], dict[str, str]]:
    """Turn options into words, so that no value can pass for an option of its own; return the key of each, too."""
    actions = {o: action for action in parser._actions for o in action.option_strings}
    words: list[str] = []
    before: dict[str, str] = {}
    for option, key, value in given:
        action = actions.get(option)
        dest = option if action is None else action.dest
        if dest in before:
            raise UserError(f"{before[dest]} and {key} are the same option: leave one out")
        before[dest] = key
        if action is not None and action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"{key} must be true or false; got {quoted(value)}")
            words += [option] if value else []
        elif isinstance(value, list) and action is not None and action.nargs == "+":
            if not value or not all(map(is_number, value)):
                raise UserError(f"{key} must be numbers; got {quoted(value)}")
            words += [option, *map(str, value)]
        elif isinstance(value, list) and isinstance(action, argparse._AppendAction):
            words += [f"{option}={v}" for v in value]
        elif value is None or isinstance(value, (dict, list)):
            raise UserError(f"{key} needs a value{', and only one' if value else ''}; got {quoted(value)}")
        else:
            words.append(f"{option}={value}")
    return words, before


def _mapping(what: str, value: Any, known: Iterable[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{what} must be a mapping; got {quoted(value)}")
    for key in value:
        if key not in known:
            raise UserError(f"{what} has no {quoted(key)}: it takes {', '.join(known)}")
    return value


def _student(value: Any) -> list[Given]:
    entries = _mapping("student", value, STUDENT).items()
    return [(STUDENT[key], f"student.{key}", content) for key, content in entries]


def _teachers(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise UserError(f"teachers must be a list of mappings; got {quoted(value)}")
    for teacher in value:
        _mapping("a teacher", teacher, TEACHER)
        if "arch" not in teacher and "resume" not in teacher:  # a file says its own
            raise UserError(f"a teacher needs an arch; got {quoted(teacher)}")
        for key, content in teacher.items():
            fits, what = TEACHER[key]
            if not fits(content):
                raise UserError(f"{key} of a teacher must be {what}; got {quoted(content)}")
    return [{"arch": "", **teacher} for teacher in value]


def _terms(value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise UserError(f"terms must be a mapping of names to mappings; got {quoted(value)}")
    for name, entry in value.items():
        if not isinstance(entry, (dict, type(None))):
            raise UserError(f"terms.{name} must be a mapping; got {quoted(entry)}")
        for word in (name, *(entry or ())):
            if not isinstance(word, str):
                raise UserError(f"terms and their keys are names; got {quoted(word)}")
    return {name: entry or {} for name, entry in value.items()}
