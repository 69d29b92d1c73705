"""Steps of a long command, each a command of its own: those that are done are not done again."""

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

LEDGER = "steps.json"
SCRIPTS = Path(__file__).parents[1]  # the entry points


@dataclass
class Steps:
    """The options of a long command, and which of its steps are done.

    Args:
        folder: of all that the steps write.
        asked: the options, by name.
        done: the steps that are done, and what each found.
    """

    folder: Path
    asked: dict[str, Any]
    done: dict[str, Any]

    def run(self, name: str, script: str, words: Sequence[str]) -> None:
        """Do a step, if it is not done: run `script` with `words`, and wait for its end.

        Raises:
            RunError: it failed.
            Stopped: it was stopped by a signal.
        """
        if name in self.done:
            print(f"=> {name}: done before", flush=True)
            return
        print(f"=> {name}: {script} {' '.join(words)}", flush=True)
        process = subprocess.Popen([sys.executable, str(SCRIPTS / script), *words])
        try:
            status = process.wait()
        except BaseException:
            process.terminate()  # it saves what is needed to resume
            process.wait()
            raise
        if status in (130, 143):
            raise Stopped(status - 128)
        if status:
            raise RunError(f"the step {name} ended with status {status}: see above, and type the same line to resume")
        self.note(name, True)

    def note(self, name: str, found: Any) -> None:
        """Write down that a step is done, and what it found."""
        self.done[name] = found
        self._write()

    def _write(self) -> None:
        content = {"format": 1, "asked": self.asked, "done": self.done}
        write_whole(self.folder / LEDGER, (json.dumps(content, indent=1) + "\n").encode())


def begin_steps(folder: Path, asked: Mapping[str, Any]) -> Steps:
    """Make the folder, or read which steps are done in it.

    Raises:
        UserError: the folder holds something else, or was begun with other options.
    """
    if exists(folder) and not is_folder(folder):
        raise UserError(f"--output {folder} is a file: give a folder")
    if not is_file(folder / LEDGER):
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
        content = json.loads((folder / LEDGER).read_bytes())
        then, done = dict(content["asked"]), dict(content["done"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / LEDGER} cannot be read: give another --output") from error
    plain = json.loads(json.dumps(asked))
    if different := [name for name in {**then, **plain} if then.get(name) != plain.get(name)]:
        words = ", ".join(f"{name} {then.get(name)!r}, now {plain.get(name)!r}" for name in different[:3])
        raise UserError(f"{folder} was begun with {words}: type the same line to resume, or give another --output")
    return Steps(folder, plain, done)
