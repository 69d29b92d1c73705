"""The lines that a run prints about its steps, its epochs and its result."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from classification.data.folders import has_numbered_classes
from classification.options.config import epoch_name, total_epochs
from classification.options.groups import Optimisation
from classification.options.options import Options
from classification.runs.launch import called_mgd, command
from classification.runs.metrics import accuracy

EVERY = 10.0  # seconds between two lines of steps


class Progress:
    """Decide which steps are printed, and estimate how long the run will take.

    Args:
        optimisation: the epochs of the run.
        print_freq: steps between two lines; None for a line every ten seconds.
        clock: returns seconds.
    """

    def __init__(
        self, optimisation: Optimisation, print_freq: int | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.optimisation, self.print_freq, self.clock = optimisation, print_freq, clock
        self.steps = 0  # steps of this process
        self.seconds = self.first = 0.0  # that all of them took, and that the first one took, which is slower
        self.aside = 0.0  # seconds of the last epoch without its steps: evaluation, matching, writing
        self._printed = 0.0  # time of the last line

    def stepped(self, seconds: float) -> None:
        """Count a step that took `seconds`."""
        self.steps += 1
        self.seconds += seconds
        self.first = self.first or seconds

    def due(self, step: int) -> bool:
        """Return whether to print `step` of the epoch, counted from 1: the first one, then by time or --print-freq."""
        now, every = self.clock(), self.print_freq
        if self.steps > 1 and (step % every if every else now - self._printed < EVERY):
            return False
        self._printed = now
        return True

    def left(self, epoch: int, step: int, steps: int) -> str:
        """Return the time left as "ETA 1:02:03", at the speed so far; empty before the second step."""
        if self.steps < 2:
            return ""
        epochs = total_epochs(self.optimisation) - epoch
        steps_left = steps - step + (epochs - 1) * steps
        seconds_per_step = (self.seconds - self.first) / (self.steps - 1)
        return f"ETA {duration(steps_left * seconds_per_step + epochs * self.aside)}"


def duration(seconds: float) -> str:
    """Return seconds as "hours:minutes:seconds"."""
    return str(timedelta(seconds=round(seconds)))


def sum_of(loss: float, weighted: Mapping[str, float]) -> str:
    """Return a loss as the sum of its weighted terms."""
    parts = " + ".join(f"{name} {value:.4f}" for name, value in weighted.items())
    return f"loss {loss:.4f} = {parts}"


def best_value(measure: str, best: Mapping[str, float]) -> str:
    """Return the --best-by value of the best epoch, with its name unless it is top-1; "-" if there is none."""
    value = best.get(f"valid_{measure}")
    text = "-" if value is None else f"{value:.4f}" if measure == "loss" else f"{value:.2f}"
    return text if measure == "top1" else f"{measure} {text}"


def epoch_line(
    optimisation: Optimisation, num_classes: int, record: Mapping[str, Any], best: str, terms: Iterable[str]
) -> str:
    """Return the line about an epoch."""
    weighted = {name: record[f"train_{name}_weighted"] for name in terms}
    return "  ".join(
        (
            epoch_name(optimisation, record["epoch"]),
            sum_of(record["train_loss"], weighted),
            accuracy(record, num_classes),
            f"best {best}",
            f"{record['images_per_second']:.1f} images/s",
        )
    )


def last_lines(
    options: Options, num_classes: int, folder: Path, best: Mapping[str, float], last: float, seconds: float
) -> list[str]:
    """Return the last lines of a run: its result, and the command that evaluates it."""
    data = options.data
    where = f" ({epoch_name(options.optimisation, int(best['epoch']))})" if "epoch" in best else ""
    words = [str(data.data), *(["--valid-list", data.valid_list] if data.valid_list else [])]
    if has_numbered_classes(str(data.data), data.train_list, data.valid_list):
        words += ["--train-list", data.train_list] if data.train_list and options.labelled else []
        words += ["--num-classes", str(num_classes)]
    words += ["--bad-images", "skip"] if data.bad_images == "skip" else []
    if called_mgd():
        evaluate = shlex.join(["mgd", "evaluate", str(folder), *words])
    else:
        evaluate = command("main_base.py", *words, "--evaluate", "--student-resume", str(folder / "best.pth"))
    measure, best_text = options.run.best_by, f"top-1 {best['valid_top1']:.2f}"
    if measure != "top1":
        best_text = f"{best_value(measure, best)} with {best_text}"
    return [
        f"=> done in {duration(seconds)}: best {best_text}{where}, last {last:.2f}",
        f"=> to evaluate the best: {evaluate}",
    ]
