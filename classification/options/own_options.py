"""The options of a run that is resumed, which stand in for those that are not typed."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from classification.errors import UserError, quoted
from classification.options.options import names_where
from classification.options.parser import script_of
from classification.options.published import without_aliases
from classification.options.term_module import check_digest
from classification.options.terms import is_number
from classification.paths import exists, is_folder
from classification.system.weight_files import damaged_error, read_checkpoint
from mgd.losses import LOSSES


def checkpoint_of(resume: str) -> str:
    """Return the last.pth of a run folder, or the file that is named.

    Raises:
        UserError: a folder without one.
    """
    if not is_folder(Path(resume)):
        return resume
    path = Path(resume, "last.pth")
    if not exists(path):
        raise UserError(f"--resume {resume}: the folder has no last.pth, so no run can be resumed from it")
    return str(path)


def own_options(
    path: str,
    parser: argparse.ArgumentParser,
    typed: Collection[str] = (),
    *,
    evaluate: bool = False,
    term_module: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options that a run recorded, by name, and its terms and teachers, which no single option says.

    Paths are relative to the folder where this process was started.

    Args:
        path: its last.pth.
        parser: the parser of the script that resumes it.
        typed: the options that are typed again.
        evaluate: whether it is evaluated, for which its images and teachers alone count.
        term_module: the file of --term-module, as it was typed.

    Raises:
        UserError: not such a file, or a run of the other script; its photographs, lists or teachers are gone.
    """
    config, options = _recorded(path, parser.prog, evaluate=evaluate)
    options, entries = without_aliases(options)
    script, resumes = script_of(options), script_of({action.dest for action in parser._actions})
    if resumes != script and not evaluate:
        raise UserError(f"{path} is from a run of {script}: resume it with {script} --resume {path}")
    started = config.get("folder", "")
    own = _values_of(path, options, parser, started)
    if evaluate:
        own = {name: value for name, value in own.items() if name in names_where("reading")}
    if "main_base.py" in (script, resumes):
        _check_places(own if started else {}, [], typed)
        return own, {"terms": entries}
    if not evaluate:
        check_digest(term_module, options.get("term_digest"), path)
    if evaluate and any(name in LOSSES and LOSSES[name].mutual for name in entries):
        raise UserError(
            f"{path} is from a run that trains all its networks: evaluate each of them with main_base.py "
            "--student-resume"
        )
    nested: dict[str, Any] = {} if evaluate else {"terms": entries}
    nested["teachers"] = [
        {**spec, "resume": _from_current_folder(started, spec["resume"])} if spec.get("resume") else spec
        for spec in options.get("teachers") or []
    ]
    if own.get("teacher_resume"):
        own["teacher_resume"] = ",".join(str(spec.get("resume", "")) for spec in nested["teachers"])
    _check_places(own if started else {}, nested["teachers"] if started else [], typed)
    return own, nested


def _from_current_folder(started: object, place: object) -> object:
    """Return a path that was relative to the folder where a run was started, relative to the current folder."""
    if isinstance(place, list):
        return [_from_current_folder(started, entry) for entry in place]
    if not (isinstance(started, str) and isinstance(place, str)) or not started or Path(started) == Path.cwd():
        return place
    return str(Path(started, place))


def _check_places(own: Mapping[str, Any], teachers: Sequence[Mapping[str, Any]], typed: Collection[str]) -> None:
    remedies = {"data": "type it before --resume", "train_list": "give --train-list", "valid_list": "give --valid-list"}
    for name, remedy in remedies.items():
        if name not in typed and own.get(name) and not exists(own[name]):
            raise UserError(
                f"{own[name]}, from which the run read its images, does not exist: if it has moved, {remedy}"
            )
    for spec in [] if {"teacher_resume", "teacher_arch"} & set(typed) else teachers:
        if spec.get("resume") and not exists(spec["resume"]):
            raise UserError(
                f"{spec['resume']}, the run's teacher, does not exist: if it has moved, give --teacher-resume"
            )


def _fits(action: argparse.Action, value: Any) -> bool:
    if value is None or isinstance(value, list):
        return value is None or (action.nargs == "+" or isinstance(action.default, list))
    if action.choices is not None:
        return value in action.choices
    return is_number(value) if action.type is not None else isinstance(value, bool if action.nargs == 0 else str)


def _check_entries(path: str, name: str, value: Any) -> None:
    entries = list(value.values()) if isinstance(value, dict) else value
    if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
        raise damaged_error(path, f"its {name} are {quoted(value)}")
    if isinstance(value, dict) != (name == "terms"):
        raise damaged_error(path, f"its {name} are {quoted(value)}")


def _recorded(path: str, prog: str, *, evaluate: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config that a last.pth recorded, and the options in it."""
    resume = read_checkpoint(path).get("resume")
    if not isinstance(resume, dict):
        if evaluate:
            raise UserError(f"{path} holds only weights: name the folder of photographs, as in {prog} DIR")
        raise UserError(f"{path} holds only weights, so no run can be resumed from it: give a run folder")
    config = resume.get("config")
    options = config.get("options") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(options, dict):
        raise damaged_error(path, f"its options are {quoted(options)}")
    for name in ("terms", "teachers"):
        if options.get(name):
            _check_entries(path, name, options[name])
    return config, options


def _values_of(
    path: str, options: Mapping[str, Any], parser: argparse.ArgumentParser, started: object
) -> dict[str, Any]:
    """Return the recorded values of the options that a resumed run takes, with paths relative to this folder."""
    actions = {action.dest: action for action in parser._actions}
    own = {name: value for name, value in options.items() if name in actions and name not in names_where("anew")}
    for name, value in own.items():
        if not _fits(actions[name], value):
            raise damaged_error(path, f"its option {name} is {quoted(value)}")
    own |= {name: _from_current_folder(started, own[name]) for name in names_where("place") if own.get(name)}
    if not options.get("seeded"):
        own.pop("seed", None)
    if not options.get("img_size_asked", True):
        own.pop("img_size", None)  # the networks' files say it
    if own.get("taps"):  # which says both
        own["student_taps"] = own["teacher_taps"] = None
    return own
