"""The options of a run that is resumed, which stand in for those that are not typed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from classification.errors import UserError, shown
from classification.models.weights import read_checkpoint
from classification.options.terms import is_number
from classification.paths import exists, is_folder
from classification.runs.restore import damaged

# What each command says anew: where it writes, what it does, and how a run is started.
ANEW = {
    "config", "output", "resume", "resume_override", "evaluate", "calibrate", "start_epoch", "pretrained",
    "use_pretrained", "student_resume",
}  # fmt: skip


def checkpoint_of(resume: str) -> str:
    """Return the last.pth of a run folder, or the file that is named.

    Raises:
        UserError: a folder without one.
    """
    if not is_folder(Path(resume)):
        return resume
    path = Path(resume, "last.pth")
    if not exists(path):
        raise UserError(f"--resume {resume}: the folder has no last.pth, so that no run can be resumed from it")
    return str(path)


def own_options(path: str, parser: argparse.ArgumentParser) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of a run, and what no single option says: its terms and teachers.

    Args:
        path: its last.pth.
        parser: the parser of the script that resumes it.

    Raises:
        UserError: not such a file, or a run of the other script.
    """
    resume = read_checkpoint(path).get("resume")
    if not isinstance(resume, dict):
        raise UserError(f"{path} holds weights only, and no run can be resumed from it: give a run folder")
    config = resume.get("config")
    options = config.get("options") if isinstance(config, dict) else None
    if not isinstance(options, dict):
        raise damaged(path, f"its options are {shown(options)}")
    script = "main_mgd.py" if "distiller" in options else "main_base.py"
    if parser.prog != script:
        raise UserError(f"{path} is of a run of {script}: resume it by {script} --resume {path}")
    known = {action.dest: action for action in parser._actions}
    own = {name: value for name, value in options.items() if name in known and name not in ANEW}
    for name, value in own.items():
        if not _fits(known[name], value):
            raise damaged(path, f"its option {name} is {shown(value)}")
    if not options.get("seeded"):
        own.pop("seed", None)
    if not options.get("img_size_asked", True):
        own.pop("img_size", None)  # the networks' files say it
    if own.get("taps"):  # which says both
        own["student_taps"] = own["teacher_taps"] = None
    if own.get("mgd_capacity") == ("single" if own.get("mgd_reducer") == "sm" else "spread"):
        own["mgd_capacity"] = None  # as the reducer has it
    if script == "main_base.py":
        return own, {}
    nested = {"terms": options.get("terms"), "teachers": options.get("teachers")}
    return own, {name: value for name, value in nested.items() if value and _entries(path, name, value)}


def _fits(action: argparse.Action, value: Any) -> bool:
    if value is None or isinstance(value, list):
        return value is None or (action.nargs == "+" or isinstance(action.default, list))
    if action.choices is not None:
        return value in action.choices
    return is_number(value) if action.type is not None else isinstance(value, bool if action.nargs == 0 else str)


def _entries(path: str, name: str, value: Any) -> bool:
    entries = list(value.values()) if isinstance(value, dict) else value
    if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
        return True
    raise damaged(path, f"its {name} are {shown(value)}")
