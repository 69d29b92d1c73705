"""Run the cells of scripts/quality.yaml whose result is missing: python scripts/bench_quality.py [--only NAME --seed S]

Each cell is a command of classification/, as a user would type it, and leaves scripts/results/quality/NAME-SEED.json:
command, options, seed, versions, commit, machine, digest of the teacher, top-1 of the last and of the best epoch,
seconds, curve. It can be killed and started again: complete cells are kept, a cut one goes on from its last epoch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from collect_run import collect, without_folders
from prepare_cifar10 import prepare
from prepare_digits import write_digits

from classification.options.config import total_epochs

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
TIMED_THREADS = 2  # of cells that measure time


@dataclass(frozen=True)
class Suite:
    """Where one kind of cells finds its data and teacher, and what all its commands share."""

    name: str
    work: Path
    base: str
    teacher: str
    teacher_cell: str  # the cell that trains the teacher; "" where its weights are given
    cells: dict[str, dict[str, Any]]

    def data(self, per_class: int = 1000) -> Path:
        """Return the data folder, made at the first call."""
        if self.name == "clothing":
            return SHARED / "data" / "clothing"
        folder = self.work / f"data-{per_class}"
        if not folder.exists():
            if self.name == "cifar10":
                prepare(SHARED / "data" / "cifar10.tar.xz", folder, per_class)
            else:
                write_digits(folder, 20)
        return folder

    def weights(self) -> Path:
        given = SHARED / "weights" / "cifar10_resnet56.pt"
        return self.work / f"{self.teacher_cell}-0" / "last.pth" if self.teacher_cell else given

    def has_teacher(self, name: str) -> bool:
        """Whether a cell's command names the teacher."""
        cell = self.cells[name]
        return bool(cell.get("script", "main_mgd") == "main_mgd" and cell.get("teacher", True))

    def run_cell(self, name: str, seed: int, threads: int) -> Path:
        """Run one cell, its start before it, and return its folder."""
        cell = self.cells[name]
        if "start" in cell:
            self.run_cell(cell["start"], seed, threads)
        data, words = self.data(cell.get("per-class", 1000)), self.words(name, seed)
        if threads > 1 and self.has_teacher(name) and not torch.cuda.is_available():  # pays on the base case
            words += ["--teacher-threads", str(threads // 2)]
        return self.run(name, cell.get("script", "main_mgd"), data, words, seed, threads)

    def words(self, name: str, seed: int) -> list[str]:
        """Return the options of a cell, those of its seed and its place left out."""
        cell = self.cells[name]
        words = [*shlex.split(self.base), *shlex.split(cell.get("options", ""))]
        if self.has_teacher(name):
            words += [*shlex.split(self.teacher), "--teacher-resume", str(self.weights())]
        if "start" in cell:
            words += ["--student-resume", str(self.work / f"{cell['start']}-{seed}" / "last.pth")]
        return words

    def run(self, name: str, script: str, data: Path, words: list[str], seed: int, threads: int) -> Path:
        """Run, or go on with, one command, and return its folder."""
        folder = self.work / f"{name}-{seed}"
        if is_done(folder):
            return folder
        cut = folder.exists()
        command = [sys.executable, "-m", f"classification.{script}", str(data), *words, "-j", "0", "-p", "1000"]
        command += ["--seed", str(seed), "--output", str(folder), "--resume", "auto"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        start = time.perf_counter()
        with (self.work / f"{name}-{seed}.log").open("a") as log:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}, seed {seed}: status {done.returncode}, see {log.name}")
        if not cut:
            (folder / "wall_seconds").write_text(f"{time.perf_counter() - start:.1f}")
        return folder


def is_done(folder: Path) -> bool:
    """Whether the run in `folder` has finished its last epoch."""
    if not (folder / "last.pth").exists():
        return False
    options = json.loads((folder / "config.json").read_text())["options"]
    last = torch.load(folder / "last.pth", weights_only=True)
    return bool(last["resume"]["epoch"] >= total_epochs(argparse.Namespace(**options)))


def read_suites(cells: Path, work: Path) -> list[Suite]:
    """Read the list of cells; `work` holds data and runs."""
    content = yaml.safe_load(cells.read_text())
    return [
        Suite(name, work / name, s["base"], s["teacher"], s.get("teacher-cell", ""), s["cells"])
        for name, s in content.items()
    ]


def keep(suite: Suite, name: str, folder: Path, results: Path, threads: int) -> dict[str, Any]:
    """Write a cell's result file."""
    found = without_folders(collect(folder))
    wall = folder / "wall_seconds"
    seconds = float(wall.read_text()) if wall.exists() else None  # unknown where the run was cut and gone on with
    teacher = hashlib.sha256(suite.weights().read_bytes()).hexdigest()[:16] if suite.has_teacher(name) else None
    result = {"cell": name, "threads": threads, "wall_seconds": seconds, "teacher": teacher, **found}
    results.mkdir(parents=True, exist_ok=True)
    beside = results / f"{name}-{found['seed']}.json.new"
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.rename(beside.with_suffix(""))
    return result


def missing(suite: Suite, results: Path, only: list[str], seed: int | None) -> list[tuple[str, int]]:
    """List the cells to run: seed by seed, in the order of the list; named ones even where a result is there."""
    cells = [
        (name, number)
        for name, cell in suite.cells.items()
        for number in ([seed] if seed is not None and only else cell.get("seeds", [0, 1, 2]))
        if (name in only if only else not (results / f"{name}-{number}.json").exists())
        and (seed is None or number == seed)
    ]
    return sorted(cells, key=lambda cell: cell[1])


def measure(suite: Suite, name: str, seed: int, results: Path, threads: int) -> None:
    """Run one cell and keep its result."""
    result = keep(suite, name, suite.run_cell(name, seed, threads), results, threads)
    print(f"{name:24} seed {seed}  top-1 {result['last_top1']:.2f}  {result['seconds']:.0f} s", flush=True)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="cifar10", choices=("cifar10", "clothing", "digits"), help="list of cells")
    parser.add_argument("--cells", type=Path, default=ROOT / "scripts" / "quality.yaml", help="the list of cells")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these cells, even where a result exists")
    parser.add_argument("--seed", type=int, help="this seed only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cells at once")
    parser.add_argument("--threads", type=int, help="threads of a cell; default: the cores, shared among the jobs")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality", help="data and run folders")
    parser.add_argument("--results", type=Path, default=ROOT / "scripts" / "results" / "quality")
    args = parser.parse_args(words)
    suite = next(suite for suite in read_suites(args.cells, args.work.resolve()) if suite.name == args.suite)
    unknown = [name for name in args.only if name not in suite.cells]
    if unknown:
        sys.exit(f"unknown cells {', '.join(unknown)}; there are {', '.join(suite.cells)}")
    cells = missing(suite, args.results, args.only, args.seed)
    if not cells:
        print("nothing is missing: name what to run again by --only NAME --seed S")
        return
    for name, number in cells if args.only else []:
        folder = suite.work / f"{name}-{number}"
        if (args.results / f"{name}-{number}.json").exists() and is_done(folder):
            sys.exit(f"{folder} is the finished run whose result is there: remove it, and the cell is run again")
    if suite.name != "digits" and not SHARED.exists():
        sys.exit(f"the data of {suite.name} is not here; --suite digits runs on data inside scikit-learn")
    suite.work.mkdir(parents=True, exist_ok=True)
    for name, _ in cells:  # before several want the same
        suite.data(suite.cells[name].get("per-class", 1000))
    if teacher := suite.teacher_cell:  # before its students, on all cores
        needed = any(suite.has_teacher(name) for name, _ in cells) and not is_done(suite.weights().parent)
        if needed or (teacher, 0) in cells:
            measure(suite, teacher, 0, args.results, args.threads or os.cpu_count() or 1)
        cells = [cell for cell in cells if cell[0] != teacher]
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    timed = [cell for cell in cells if suite.cells[cell[0]]["group"] == "time"]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(measure, suite, *cell, args.results, threads) for cell in cells if cell not in timed]
        for future in futures:
            future.result()
    for cell in timed:  # one at a time, nothing beside it
        measure(suite, *cell, args.results, TIMED_THREADS)


if __name__ == "__main__":
    main()
