"""Run the steps of a long command, each a command of its own, and skip steps that are done when it is resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from classification.errors import RunError, Stopped, UserError
from classification.paths import exists, is_file, is_folder
from classification.system.new_files import write_whole

STEPS_FILE = "steps.json"
SCRIPTS = Path(__file__).parents[1]  # the folder of the commands


@dataclass
class Steps:
    """The options of a long command, and its finished steps.

    Args:
        folder: the output of all steps.
        asked: the options by name.
        done: {finished step: its result}.
    """

    folder: Path
    asked: dict[str, Any]
    done: dict[str, Any]

    def run(self, name: str, script: str, arguments: Sequence[str]) -> None:
        """Run `script` with the arguments `words` and wait for its end, unless the step is done already.

        Raises:
            RunError: the script failed.
            Stopped: the script was stopped by a signal.
        """
        if name in self.done:
            print(f"=> {name}: done before", flush=True)
            return
        print(f"=> {name}: {script} {' '.join(arguments)}", flush=True)
        process = subprocess.Popen([sys.executable, str(SCRIPTS / script), *arguments])
        try:
            status = process.wait()
        except BaseException:
            process.terminate()  # it saves a checkpoint to resume from
            process.wait()
            raise
        if status in (130, 143):
            raise Stopped(status - 128)
        if status:
            raise RunError(f"the step {name} ended with status {status}: see above, and type the same line to resume")
        self.record(name, True)

    def record(self, name: str, result: Any) -> None:
        """Record that a step is done, and its result."""
        self.done[name] = result
        self._write()

    def _write(self) -> None:
        content = {"format": 1, "asked": self.asked, "done": self.done}
        write_whole(self.folder / STEPS_FILE, (json.dumps(content, indent=1) + "\n").encode())


def open_steps(folder: Path, asked: Mapping[str, Any]) -> Steps:
    """Make the folder, or read which steps are done in an existing one.

    Raises:
        UserError: the folder contains other files, or was begun with other options.
    """
    if exists(folder) and not is_folder(folder):
        raise UserError(f"--output {folder} is a file: give a folder")
    if not is_file(folder / STEPS_FILE):
        if is_folder(folder) and any(folder.iterdir()):
            raise UserError(f"--output {folder} contains other files: give another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {folder} cannot be made: {error.strerror}") from error
        steps = Steps(folder, dict(asked), {})
        steps._write()
        return steps
    try:
        content = json.loads((folder / STEPS_FILE).read_bytes())
        old, done = dict(content["asked"]), dict(content["done"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / STEPS_FILE} cannot be read: give another --output") from error
    new = json.loads(json.dumps(asked))
    if differences := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
        words = ", ".join(f"{name} {old.get(name)!r}, now {new.get(name)!r}" for name in differences[:3])
        raise UserError(f"{folder} was begun with {words}: type the same line to resume, or give another --output")
    return Steps(folder, new, done)
