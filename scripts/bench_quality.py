"""Run the cells whose record is missing: python scripts/bench_quality.py [--suite SUITE --only NAME --seed S]

The suites stand in scripts/quality.yaml; those that were planned before they were run, in scripts/transport.yaml and
unlabelled.yaml. Each cell is a command of classification/, as a user would type it. When it is done, its record is
inserted into results/SUITE.csv and its curve into results/SUITE_curves.csv (columns: scripts/results_table.py). A kill
is harmless, and several processes may run different cells at once: complete cells are kept, a cut one is resumed from
its last epoch.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from cells import CELLS, GIVEN_TEACHER, RESULTS, cell_words, data_kind, data_name, has_teacher
from cells import read_suites as read_contents
from collect_run import collect, without_folders
from hold_out import hold_out
from prepare_cifar10 import prepare
from prepare_digits import write_digits
from prepare_pile import make
from results_table import Record, keep_record, read_keys

from classification.runs.repeated import Command, is_done

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
TIMED_THREADS = 2  # of cells that measure time


@dataclass(frozen=True)
class Suite:
    """Where one kind of cells finds its data and teacher, and what all its commands share."""

    name: str
    work: Path
    content: dict[str, Any]  # of the list of cells
    locks: dict[str, Lock] = field(default_factory=lambda: defaultdict(Lock))  # by what several cells need

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        return dict(self.content["cells"])

    @property
    def kind(self) -> str:
        return data_kind(self.name, self.content)

    @property
    def teacher_cell(self) -> str:
        """The cell that trains the teacher; "" where its weights are given."""
        return str(self.content.get("teacher-cell", ""))

    def data(self, name: str) -> Path:
        """Return the data folder of a cell, made at the first call."""
        cell, archive, clothing = self.cells[name], SHARED / "data" / "cifar10.tar.xz", SHARED / "data" / "clothing"
        if data_name(self.kind, cell) == clothing.name:
            return clothing
        folder = self.work / data_name(self.kind, cell)
        if not folder.exists():
            per_class = cell.get("per-class", 1000)
            if self.kind == "cifar10":
                prepare(archive, folder, per_class, cell.get("held-out", 0))
            elif "held-out" in cell:
                hold_out(clothing, folder, cell["held-out"])
            elif self.kind == "clothing":
                make(archive, self.work / f"pile-{per_class}", per_class, clothing, folder)
            else:
                write_digits(folder, 20)
        pile = self.work / f"pile-{cell.get('per-class')}"
        if self.kind == "cifar10" and cell.get("script") == "semi_supervised" and not pile.exists():
            make(archive, pile, cell["per-class"])
        return folder

    def weights(self) -> Path:
        given = SHARED / "weights" / GIVEN_TEACHER
        return self.work / f"{self.teacher_cell}-0" / "last.pth" if self.teacher_cell else given

    def run_cell(self, name: str, seed: int, threads: int) -> Path:
        """Run one cell, its start before it, and return its folder."""
        cell = self.cells[name]
        for before in filter(None, (cell.get("start"), cell.get("needs"))):
            with self.locks[f"{before}-{seed}"]:
                if before in self.content.get("caches", {}):
                    self.make_cache(before, self.data(name), threads)
                else:
                    self.run_cell(before, seed, threads)
        words, data = self.words(cell, seed), self.data(name)
        if threads > 1 and has_teacher(cell) and not torch.cuda.is_available():  # pays on the base case
            words += ["--teacher-threads", str(threads // 2)]
        if cell.get("script") != "semi_supervised":
            return self.run(name, cell.get("script", "main_mgd"), data, words, seed, threads)
        folder = self.work / f"{cell['run']}-{seed}"
        with self.locks[folder.name]:
            place = ["-j", "0", "--seed", str(seed), "--output", str(folder)]
            self.type(folder, [f"{cell['script']}.py", str(data), *place, *words], threads)
        return folder / str(cell["part"])

    def words(self, cell: dict[str, Any], seed: int) -> list[str]:
        """Return the options of a cell."""
        start, given = self.work / f"{cell.get('start')}-{seed}" / "last.pth", f"{SHARED / 'weights'}/"
        made = str(self.work.parent)
        return cell_words(self.content, cell, str(self.weights()), str(start), given=given, made=made, seed=seed)

    def whole_command(self, name: str, seed: int) -> str:
        """Return the command of a cell that is a part of one, as records have it; "" for other cells."""
        cell = self.cells[name]
        if "part" not in cell:
            return ""
        words = [f"{cell['script']}.py", str(self.data(name)), "--seed", str(seed), *self.words(cell, seed)]
        return shlex.join(without_folders(words))

    def make_cache(self, name: str, data: Path, threads: int) -> None:
        """Store a teacher's outputs, or go on with it."""
        words = self.words({"script": "reinforce", "options": self.content["caches"][name]}, 0)
        base = shlex.split(self.content.get("base", ""))  # belongs to trainings
        place = [str(data), "-j", "0", "--output", str(self.work / name)]
        self.type(self.work / name, ["reinforce.py", words[len(base)], *place, *words[len(base) + 1 :]], threads)

    def type(self, folder: Path, words: list[str], threads: int) -> None:
        """Run a command that resumes by itself where it was cut, and does nothing where it is done."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "classification" / words[0]), *words[1:]]
        with folder.with_name(f"{folder.name}.log").open("ab") as log:
            status = subprocess.run(command, stdout=log, stderr=log, env=environment, cwd=ROOT, check=False).returncode
        if status:
            raise RuntimeError(f"{shlex.join(command)}: status {status}, see {folder.name}.log beside it")

    def run(self, name: str, script: str, data: Path, words: list[str], seed: int, threads: int) -> Path:
        """Run, or resume, one command, and return its folder."""
        folder = self.work / f"{name}-{seed}"
        if is_done(folder):
            return folder
        cut, log, start = folder.exists(), self.work / f"{name}-{seed}.log", time.perf_counter()
        command = Command(script, (str(data), *words, "-j", "0", "-p", "1000"), seed, folder, log)
        if status := command.start(threads, ROOT).wait():
            raise RuntimeError(f"{name}, seed {seed}: status {status}, see {log}")
        if not cut:
            (folder / "wall_seconds").write_text(f"{time.perf_counter() - start:.1f}")
        return folder


def read_suites(files: Iterable[Path], work: Path) -> dict[str, Suite]:
    """Read the lists of cells; `work` holds data and runs."""
    return {name: Suite(name, work / name, suite) for name, suite in read_contents(files).items()}


def keep(name: str, folder: Path, table: Path, threads: int, command: str = "") -> Record:
    """Insert a cell's record; `command` is the whole one of which the folder is a part."""
    wall = folder / "wall_seconds"
    seconds = float(wall.read_text()) if wall.exists() else None  # unknown where the run was cut and resumed
    record = collect(folder, name, wall_seconds=seconds, threads=threads)
    record = replace(record, command=command) if command else record
    keep_record(table, record)
    return record


def missing(suite: Suite, kept: set[tuple[str, int]], only: list[str], seed: int | None) -> list[tuple[str, int]]:
    """List the cells to run: seed by seed, in the order of the list; named ones even where a record is there."""
    cells = [
        (name, number)
        for name, cell in suite.cells.items()
        for number in ([seed] if seed is not None and only else cell.get("seeds", [0, 1, 2]))
        if (name in only if only else (name, number) not in kept) and (seed is None or number == seed)
    ]
    return sorted(cells, key=lambda cell: cell[1])


def measure(suite: Suite, name: str, seed: int, table: Path, threads: int) -> None:
    """Run one cell and keep its record."""
    folder = suite.run_cell(name, seed, threads)
    record = keep(name, folder, table, threads, suite.whole_command(name, seed))
    print(f"{name:24} seed {seed}  top-1 {record.last_top1:.2f}  {record.seconds:.0f} s", flush=True)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="cifar10", help="list of cells; default: %(default)s")
    parser.add_argument("--cells", type=Path, nargs="+", default=CELLS, metavar="FILE", help="files of suites")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these cells, even where a record exists")
    parser.add_argument("--seed", type=int, help="this seed only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cells at once")
    parser.add_argument("--threads", type=int, help="threads of a cell; default: the cores, shared among the jobs")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality", help="data and run folders")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    args = parser.parse_args(words)
    suites = read_suites(args.cells, args.work.resolve())
    if args.suite not in suites:
        sys.exit(f"there is no suite {args.suite}; there are {', '.join(suites)}")
    suite = suites[args.suite]
    unknown = [name for name in args.only if name not in suite.cells]
    if unknown:
        sys.exit(f"unknown cells {', '.join(unknown)}; there are {', '.join(suite.cells)}")
    table = args.results / f"{suite.name}.csv"
    kept = read_keys(table)
    cells = missing(suite, kept, args.only, args.seed)
    if not cells:
        print("nothing is missing: name what to run again by --only NAME --seed S")
        return
    for name, number in cells if args.only else []:
        folder = suite.work / f"{name}-{number}"
        if (name, number) in kept and is_done(folder):
            sys.exit(f"{folder} is the finished run whose record is there: remove it, and the cell is run again")
    if suite.kind != "digits" and not SHARED.exists():
        sys.exit(f"the data of {suite.name} is not here; --suite digits runs on data inside scikit-learn")
    suite.work.mkdir(parents=True, exist_ok=True)
    for name, _ in cells:  # before several want the same
        suite.data(name)
    if teacher := suite.teacher_cell:  # before its students, on all cores
        needed = any(has_teacher(suite.cells[name]) for name, _ in cells) and not is_done(suite.weights().parent)
        if needed or (teacher, 0) in cells:
            measure(suite, teacher, 0, table, args.threads or os.cpu_count() or 1)
        cells = [cell for cell in cells if cell[0] != teacher]
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    timed = [cell for cell in cells if suite.cells[cell[0]]["group"] == "time"]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(measure, suite, *cell, table, threads) for cell in cells if cell not in timed]
        for future in futures:
            future.result()
    for cell in timed:  # one at a time, nothing beside it
        measure(suite, *cell, table, TIMED_THREADS)


if __name__ == "__main__":
    main()
