"""Distil a student on handwritten digits: a teacher, then on three seeds a student alone and a distilled one.

Every run writes what it says to a log file in the output folder. The screen shows one line per run, a table, and the
path of a page about the runs.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collect_run import collect
from prepare_digits import write_digits

COMMON = (
    "--img-size 16 --train-crop pad --hflip 0 -b 25 --lr-schedule cosine --wd 5e-4 --lr 0.05 -p 1000 -j 0 --cache ram"
)


@dataclass(frozen=True)
class Plan:
    """The options of the three kinds of run, beside `COMMON`."""

    teacher: str = "-a cifar_resnet20 --epochs 30"
    student: str = "-a cifar_resnet20_w0.5 --epochs 10"
    distil: str = (
        "--teacher-arch cifar_resnet20 --distiller mgd --mgd-reducer amp --mgd-update-freq 2 --loss-factor 1e3"
    )


class RunError(Exception):
    """A run ended with another status than 0."""


def run(script: str, output: Path, options: str, seed: int) -> dict[str, Any]:
    """Run one of the main scripts as one would type it, its output in a log file; return what it measured.

    Raises:
        RunError: it ended with another status than 0.
    """
    from classification import main_base, main_mgd

    words = [str(output.parent / "data"), *shlex.split(options), "--seed", str(seed), "--output", str(output)]
    log = output.parent / "logs" / f"{output.name}.log"
    start = time.perf_counter()
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        print(f"$ python classification/{script} {shlex.join(words)}", flush=True)
        status = {"main_base.py": main_base, "main_mgd.py": main_mgd}[script].main(words)
    if status:
        raise RunError(f"{output.name} ended with status {status}; the last lines of {log}:\n{_tail(log)}")
    return vars(collect(output, output.name, wall_seconds=time.perf_counter() - start))


def write_page(folder: Path, runs: dict[str, list[dict[str, Any]]]) -> Path:
    """Write the report page about the runs of a demo, its output in a log file; return its path.

    Raises:
        RunError: it could not be written.
    """
    from classification import report

    seeds = [(role, result["seed"]) for role in ("distilled", "alone") for result in runs[role]]
    names = [*(f"{role}-{seed}" for role, seed in seeds), "teacher"]
    page, log = folder / "report.html", folder / "logs" / "report.log"
    words = [*(str(folder / name) for name in names), "--data", str(folder / "data"), "--output", str(page)]
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        status = report.main(words)
    if status:
        raise RunError(f"the page could not be written; the last lines of {log}:\n{_tail(log)}")
    return page


def _tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-5:])


def _use_one_thread() -> None:
    # The networks are so small that threads mostly wait for each other: two runs at once use two cores better.
    import torch

    torch.set_num_threads(1)


def demo(
    folder: Path, per_class: int, seeds: Sequence[int], plan: Plan = Plan(), workers: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Train a teacher in `folder`, then for each seed a student alone and a distilled one.

    Args:
        folder: where data, run folders and logs go.
        per_class: labelled digits per class.
        seeds: of the students; the first is the teacher's too.
        plan: options of the runs.
        workers: processes that train at the same time; None for one per core.

    Returns:
        The measurements of every run, by role.

    Raises:
        RunError: a run ended with another status than 0.
    """
    write_digits(folder / "data", per_class)
    (folder / "logs").mkdir()
    student = f"{plan.student} {COMMON}"
    distil = f"{student} {plan.distil} --teacher-resume {shlex.quote(str(folder / 'teacher' / 'best.pth'))}"
    students = [
        job
        for seed in seeds
        for job in (("alone", "main_base.py", student, seed), ("distilled", "main_mgd.py", distil, seed))
    ]
    workers = min(workers or os.cpu_count() or 1, len(students))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _use_one_thread) as pool:
        teacher = pool.submit(run, "main_base.py", folder / "teacher", f"{plan.teacher} {COMMON}", seeds[0]).result()
        _say("teacher", seeds[0], teacher)
        waiting = {
            pool.submit(run, script, folder / f"{role}-{seed}", options, seed): (role, seed)
            for role, script, options, seed in students
        }
        found = {}
        for done in as_completed(waiting):
            found[waiting[done]] = done.result()
            _say(*waiting[done], done.result())
    return {"teacher": [teacher], **{role: [found[role, seed] for seed in seeds] for role in ("alone", "distilled")}}


def _say(role: str, seed: int, result: dict[str, Any]) -> None:
    name = f"{role}, seed {seed}"
    print(f"{name:20} top-1 {result['last_top1']:6.2f} %   {result['wall_seconds']:5.1f} s", flush=True)


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return top-1 of the last epoch (mean, standard deviation over seeds), seconds of a run, parameters."""
    lines = [f"{'':12}{'top-1 %':>8}{'+-':>7}{'seeds':>7}{'seconds':>9}{'parameters':>12}"]
    for role, results in runs.items():
        top1 = [result["last_top1"] for result in results]
        spread = f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        seconds = statistics.mean(result["wall_seconds"] for result in results)
        lines.append(
            f"{role:12}{statistics.mean(top1):8.2f}{spread:>7}{len(top1):7}{seconds:9.1f}{results[0]['parameters']:12,}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S"))
    parser.add_argument("--per-class", type=int, default=20, help="labelled digits per class")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students; the first is the teacher's too"
    )
    args = parser.parse_args()
    labelled = 10 * args.per_class
    print(
        f"Distilling on {labelled} handwritten digits, in one to three minutes on two cores:\n"
        f"a teacher, then {len(args.seeds)} times a small student alone and the same student with the teacher.\n",
        flush=True,
    )
    try:
        runs = demo(args.output, args.per_class, args.seeds)
        page = write_page(args.output, runs)
    except RunError as error:
        sys.exit(str(error))
    print(f"\nTop-1 after the last epoch, on {1797 - labelled} other digits; +- is the standard deviation:\n")
    print(f"{table(runs)}\n\nRuns, checkpoints and logs: {args.output}/\nOpen this page in a browser: {page}")


if __name__ == "__main__":
    main()
