"""Several runs of the main scripts, each in its own process; interrupted ones are resumed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from classification.errors import RunError, UserError, one_line
from classification.options.config import total_epochs
from classification.options.options import make_options
from classification.paths import exists
from classification.runs.checkpoint import lock_folder

ROOT = Path(__file__).parents[2]
PAUSE = 0.05  # seconds between two checks of the processes


@dataclass(frozen=True)
class Command:
    """One run.

    Args:
        script: main_base or main_mgd.
        words: the command line, without --seed, --output and --resume.
        seed: of the run.
        folder: the run folder.
        log: the file that its output is appended to.
    """

    script: str
    words: tuple[str, ...]
    seed: int
    folder: Path
    log: Path

    def typed(self) -> list[str]:
        """Return the command that begins the run, or resumes it."""
        place = ["--seed", str(self.seed), "--output", str(self.folder), "--resume", "auto"]
        return [sys.executable, "-m", f"classification.{self.script}", *self.words, *place]

    def start(self, threads: int, cwd: Path | None = None, *, apart: bool = False) -> subprocess.Popen[bytes]:
        """Start the run.

        Args:
            threads: number of threads.
            cwd: its working directory; None for the current one.
            apart: whether it gets a session of its own, so that Ctrl-C does not reach it.
        """
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self.typed(), cwd=cwd, stdout=log, stderr=log, env=environment, start_new_session=apart
            )


def is_done(folder: Path) -> bool:
    """Return whether the run in `folder` has finished its last epoch."""
    if not (folder / "last.pth").exists():
        return False
    options = json.loads((folder / "config.json").read_text())["options"]
    last = torch.load(folder / "last.pth", weights_only=True)
    return bool(last["resume"]["epoch"] >= total_epochs(make_options(options).optimisation))


def last_top1(folder: Path) -> float:
    """Return the top-1 in percent after the last epoch of a run that is done."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(lines[-1])["valid_top1"])


def run_all(commands: Sequence[Command], *, jobs: int, threads: int, cwd: Path | None = None) -> Iterator[Command]:
    """Run commands, `jobs` of them at once; yield each when it is done.

    A run that is done already is not started. If the iteration is stopped, the runs finish their steps and save.

    Args:
        commands: in the order of their start.
        jobs: number of runs at once.
        threads: number of threads of each.
        cwd: their working directory; None for the current one.

    Raises:
        RunError: a run failed; the others were stopped.
    """
    waiting, running = list(commands), dict[Command, subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                command = waiting.pop(0)
                await_others(command.folder)
                if is_done(command.folder):
                    yield command
                else:
                    running[command] = command.start(threads, cwd, apart=True)  # a signal is sent to it once, below
            for command in [command for command, process in running.items() if process.poll() is not None]:
                if status := running.pop(command).returncode:
                    raise RunError(f"{command.folder.name} ended with status {status}: {_last_line(command.log)}")
                yield command
            time.sleep(PAUSE)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def await_others(folder: Path) -> None:
    """Wait while a process of an earlier call still writes to a run folder."""
    announced = False
    while exists(folder):
        try:
            lock_folder(folder).close()
            return
        except UserError as error:
            if not announced:
                print(f"=> waiting: {error}", file=sys.stderr, flush=True)
            announced = True
            time.sleep(1)


def warnings_in(log: Path) -> list[str]:
    """Return the warnings that a run printed, each once."""
    lines = log.read_text(errors="replace").splitlines() if exists(log) else []
    return list(dict.fromkeys(one_line(line) for line in lines if line.startswith("!! WARNING")))


def _last_line(log: Path) -> str:
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").strip().splitlines()
    return f"{one_line(lines[-1]) if lines else 'it said nothing'} (see {log})"
