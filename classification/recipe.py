"""Recipes: YAML files that hold options under their names, and student, teachers and terms as nested mappings."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

import yaml

from classification.errors import UserError
from classification.terms import OPTIONS, SCHEDULE

STUDENT = {"arch": "--arch", "resume": "--student-resume", "pretrained": "--pretrained"}
TEACHER = ("arch", "resume", "weights", "weight", "img_size", "mean", "std", "frozen")


def read_recipe(parser: argparse.ArgumentParser, path: Path, distillation: bool) -> tuple[list[str], dict[str, Any]]:
    """Read a recipe as the words that one would type, so that both are checked by the same parser.

    Args:
        parser: the parser whose options it may hold.
        path: the file.
        distillation: whether it may hold `teachers` and `terms`.

    Returns:
        The words, and what has no option: {"terms": {name: {key: value}}, "teachers": [{key: value}]}.

    Raises:
        UserError: a file that is not such a mapping, an unknown key.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} must be a mapping of option names to values")
    try:
        words = _student(content.pop("student", {}))
        nested: dict[str, Any] = {}
        if distillation:
            nested["teachers"] = _teachers(content.pop("teachers", []))
            nested["terms"], more = _terms(content.pop("terms", {}))
            words += more
        return [*words, *_words(parser, content)], nested
    except UserError as error:
        raise UserError(f"recipe {path}: {error}") from error


def _words(parser: argparse.ArgumentParser, content: dict[Any, Any]) -> list[str]:
    flags = {o: action for action in parser._actions for o in action.option_strings if o.startswith("--")}
    words: list[str] = []
    for key, value in content.items():
        option = "--" + str(key).replace("_", "-")
        if option not in flags or option in ("--help", "--config"):
            near = difflib.get_close_matches(option, flags, n=3)
            hint = f"; close ones are {', '.join(n[2:] for n in near)}" if near else ""
            raise UserError(f"unknown key {key!r}{hint}")
        if flags[option].nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"{key} must be true or false; got {value!r}")
            words += [option] if value else []
        elif value is None or isinstance(value, dict):
            raise UserError(f"{key} needs a value; got {value!r}")
        else:
            words += [option, *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return words


def _mapping(what: str, value: Any, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{what} must be a mapping; got {value!r}")
    for key in value:
        if key not in known:
            raise UserError(f"{what} has no {key!r}: it takes {', '.join(known)}")
    return value


def _student(value: Any) -> list[str]:
    words: list[str] = []
    for key, content in _mapping("student", value, tuple(STUDENT)).items():
        if key == "pretrained":
            words += [STUDENT[key]] if content else []
        else:
            words += [STUDENT[key], str(content)]
    return words


def _teachers(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise UserError(f"teachers must be a list of mappings; got {value!r}")
    for teacher in value:
        _mapping("a teacher", teacher, TEACHER)
        if not isinstance(teacher.get("arch"), str):
            raise UserError(f"a teacher needs an arch; got {teacher!r}")
        for key in ("mean", "std"):
            if key in teacher and (not isinstance(teacher[key], list) or len(teacher[key]) != 3):
                raise UserError(f"{key} of a teacher must be three numbers; got {teacher[key]!r}")
    return value


def _terms(value: Any) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Split terms into what is kept as a mapping, and what mgd, kd and ce have options for."""
    if not isinstance(value, dict):
        raise UserError(f"terms must be a mapping of names to mappings; got {value!r}")
    kept: dict[str, dict[str, Any]] = {}
    words: list[str] = []
    for name, entry in value.items():
        entry = {} if entry is None else entry
        if not isinstance(entry, dict):
            raise UserError(f"terms.{name} must be a mapping; got {entry!r}")
        prefix = OPTIONS.get(name)
        kept[name] = {key: v for key, v in entry.items() if prefix is None or key in SCHEDULE}
        for key, v in entry.items():
            if key not in kept[name]:
                words += [f"--{prefix}-{str(key).replace('_', '-')}", str(v)]
    return kept, words
