"""Change lines of the code at random, and see whether a test fails: python scripts/mutate.py

cosmic-ray makes the mutations (`pip install -e '.[dev,mutation]'`). This script draws them, one per line, from the
files of mgd/ and classification/training/, and runs the tests that belong to each file. A mutation is killed when one
of these tests fails or takes too long, and it survives when all pass. Mutations in annotations are left out: they
change nothing that runs.

Nothing in the checkout is changed: tests run in a temporary copy of the files that git tracks. The result file has one
JSON object per line. Type the same command again to resume; what the file has is not judged again. After a change of
the code, only mutations of changed files are judged again. `--report` prints the results and runs nothing.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[1]
ROOMS = ("mgd", "classification/training")
# The tests of a file are its mirror (tests/mgd/losses/test_kd.py for mgd/losses/kd.py) and those of its room.
LOSSES = "gradients agreement golden term relative"
OF_ROOM = {
    "mgd": ["tests/mgd/test_checks.py", "tests/mgd/test_distiller.py", "tests/mgd/taps", "tests/mgd/teachers"],
    "mgd/flow": ["tests/mgd/flow", "tests/mgd/losses/test_mgd.py"],
    "mgd/losses": [*(f"tests/mgd/losses/test_{name}.py" for name in LOSSES.split()), "tests/mgd/test_distiller.py"],
    "mgd/taps": ["tests/mgd/taps", "tests/mgd/teachers", "tests/mgd/test_distiller.py"],
    "mgd/teachers": ["tests/mgd/teachers", "tests/mgd/test_distiller.py"],
    "classification/training": ["tests/classification/training"],
}
# What a file needs beside these, because it has no mirror or because another file's tests cover it.
ALSO = {
    "mgd/losses/mgd.py": ["tests/mgd/losses/test_mgd_update.py"],
    "mgd/losses/stage.py": ["tests/mgd/losses/test_mgd.py", "tests/mgd/losses/test_mgd_update.py"],
    "mgd/losses/reduce.py": ["tests/mgd/losses/test_mgd.py"],
    "mgd/losses/gather.py": ["tests/mgd/losses/test_crd.py"],
    "mgd/losses/margin.py": ["tests/mgd/losses/test_ofd.py"],
    "mgd/losses/align.py": ["tests/mgd/losses/test_fitnet.py", "tests/mgd/losses/test_map_l2.py"],
}
WHOLE_RUNS = [
    "tests/classification/test_wiring.py",
    "tests/classification/test_main.py",
]  # for files of training/ without a mirror
MEMORY = 16 * 2**30  # bytes of addresses per process: a mutated size must not fill the machine


@dataclass(frozen=True)
class Edit:
    """One mutation: an operator of cosmic-ray at one of its places in a file."""

    file: str
    line: int
    operator: str
    occurrence: int
    code: str  # the file after it

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.file}\n{self.code}".encode()).hexdigest()[:16]

    def diff(self) -> str:
        before, after = (ROOT / self.file).read_text().splitlines(), self.code.splitlines()
        return "\n".join([*difflib.unified_diff(before, after, n=0, lineterm="")][3:])


def spans_of_annotations(code: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the places of all annotations: (line, byte) of start and end."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(node.returns)
        elif isinstance(node, ast.AnnAssign | ast.arg):
            found.append(node.annotation)
    ends = [(e, e.end_lineno or 0, e.end_col_offset or 0) for e in found if e is not None]
    return [((e.lineno, e.col_offset), (line, column)) for e, line, column in ends]


def places(code: str) -> dict[int, list[tuple[str, int]]]:
    """Return {line: [(operator, occurrence)]} of every mutation outside of annotations."""
    lines, spans, nodes = code.splitlines(), spans_of_annotations(code), list(ast_nodes(get_ast(code)))
    found: dict[int, list[tuple[str, int]]] = {}
    for name in sorted(operator_names()):
        kind = get_operator(name)
        if kind.arguments():
            continue  # needs names of variables
        operator, occurrence = kind(), -1
        for node in nodes:
            for (line, column), _ in operator.mutation_positions(node):
                occurrence += 1
                place = (line, len(lines[line - 1][:column].encode()))
                if not any(start <= place < end for start, end in spans):
                    found.setdefault(line, []).append((name, occurrence))
    return found


def changed(code: str, operator: str, occurrence: int) -> str | None:
    """Return the code after a mutation, or None where it is no Python or the same program."""
    try:
        after = mutate_code(code, get_operator(operator)(), occurrence)
        same = after is None or ast.dump(ast.parse(after)) == ast.dump(ast.parse(code))
    except (SyntaxError, AttributeError):  # cosmic-ray raises the second at `except a.B`
        return None
    return None if same else after


def draw(number: int, seed: int) -> Iterator[Edit]:
    """Yield random mutations of as many lines; a line that stays what it is stays drawn or not, with its mutation."""
    codes = {str(p.relative_to(ROOT)): p.read_text() for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))}
    lines = [
        (key, file, line, choices)
        for file, code in codes.items()
        for key, line, choices in _keyed(f"{seed} {file}", code)
    ]
    print(f"{len(lines)} lines of {len(codes)} files can be mutated, {number} are drawn with seed {seed}", flush=True)
    drawn = (_edit(random.Random(key), file, codes[file], line, choices) for key, file, line, choices in sorted(lines))
    yield from islice(filter(None, drawn), number)


def _keyed(where: str, code: str) -> Iterator[tuple[str, int, list[tuple[str, int]]]]:
    """Yield (random key, line, mutations) of every line; the key depends on the text of the line, not on its number."""
    seen: Counter[str] = Counter()
    texts = code.splitlines()
    for line, choices in sorted(places(code).items()):
        text = texts[line - 1].strip()
        seen[text] += 1
        yield hashlib.sha256(f"{where} {text} {seen[text]}".encode()).hexdigest(), line, choices


def _edit(rng: random.Random, file: str, code: str, line: int, choices: list[tuple[str, int]]) -> Edit | None:
    for operator, occurrence in rng.sample(choices, len(choices)):
        after = changed(code, operator, occurrence)
        if after is not None:
            return Edit(file, line, operator.partition("/")[2], occurrence, after)
    return None


def tests_of(file: str) -> list[str]:
    """Return the tests of a file, its mirror first, so that most mutations are killed early."""
    path = Path(file)
    mirror = f"tests/{path.parent}/test_{path.stem}.py"
    has_mirror = (ROOT / mirror).exists()
    found = [mirror] if has_mirror else []
    found += [*ALSO.get(file, []), *OF_ROOM[str(path.parent)]]
    if path.parts[0] == "classification" and not has_mirror:
        found += WHOLE_RUNS
    return [test for test in dict.fromkeys(found) if (ROOT / test).exists()]


def copy_tree(folder: Path) -> None:
    """Copy the files that git tracks, as they are in the checkout."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def judge(folder: Path, tests: list[str], core_seconds: float) -> dict[str, Any]:
    """Run tests in a copy, on one thread; return status, core-seconds, seconds, and the test that failed.

    Args:
        folder: the copy.
        tests: files or names of tests.
        core_seconds: limit of the time on a core, which does not depend on what else the machine does; a process that
            waits for ever uses none, and is ended after ten times as many seconds.
    """
    variables = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-rf", *tests]
    begun, used = time.monotonic(), _cpu_seconds()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=partial(_limit, ceil(core_seconds)),
    )
    try:
        output, _ = process.communicate(timeout=10 * core_seconds)
        status = "killed" if process.returncode else "survived"
        status = "timeout" if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL) else status
        if process.returncode in (4, 5):
            raise SystemExit(f"pytest found no tests among {tests}: correct OF_ROOM and ALSO\n{output[-2000:]}")
    except subprocess.TimeoutExpired:
        output, status = "", "timeout"
    finally:
        _end(process)
    seconds = time.monotonic() - begun
    core = _cpu_seconds() - used
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {
        "status": status,
        "core_seconds": round(core, 1),
        "seconds": round(seconds, 1),
        "failed": failed[0].split(" - ")[0].partition(" ")[2] if failed else "",
    }


def _limit(core_seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (core_seconds, core_seconds + 5))


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Results:
    """The result file: one JSON object per line, by its key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.records: dict[str, dict[str, Any]] = {r["key"]: r for r in map(json.loads, lines)}

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        self.records[record["key"]] = record
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        return record

    def hours(self) -> float:
        return sum(float(record["core_seconds"]) for record in self.records.values()) / 3600


def baseline(results: Results, folder: Path, tests: list[str]) -> dict[str, Any]:
    """Return what these tests cost on the code as it is; they must pass there."""
    key = f"{hashlib.sha256(' '.join(tests).encode()).hexdigest()[:16]} of {tree_digest(folder)}"
    if key not in results.records:
        record = judge(folder, tests, core_seconds=600)
        if record["status"] != "survived":
            failed = record["failed"] or record["status"]
            raise SystemExit(f"tests fail without a mutation ({failed}): correct them first")
        results.add({"key": key, "baseline": tests, **record})
    return results.records[key]


def tree_digest(folder: Path) -> str:
    """Digest the code of a copy, so that a baseline is measured again where it has changed."""
    digest = hashlib.sha256()
    for room in ("mgd", "classification", "tests"):
        for path in sorted((folder / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def report(edits: list[Edit], results: Results) -> None:
    """Print counts per room, and every mutation that survived."""
    records = [results.records[edit.key] for edit in edits if edit.key in results.records]
    counts = Counter((str(Path(r["file"]).parent), r["status"]) for r in records)
    print(f"\n{'room':28}{'killed':>8}{'timeout':>9}{'survived':>10}")
    for room in sorted({room for room, _ in counts}):
        print(f"{room:28}{counts[room, 'killed']:8}{counts[room, 'timeout']:9}{counts[room, 'survived']:10}")
    survivors = [r for r in records if r["status"] == "survived"]
    for record in survivors:
        print(f"\n{record['file']}:{record['line']}  {record['operator']}\n{record['diff']}")
    print(f"\n{len(records)} of {len(edits)} judged, {len(records) - len(survivors)} killed, {len(survivors)} survived")


def run(edits: list[Edit], results: Results, hours: float) -> None:
    """Judge each mutation that has no result yet, until the core-hours are used."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        folder = Path(name)
        copy_tree(folder)
        for number, edit in enumerate(edits, 1):
            if edit.key in results.records:
                continue
            if results.hours() >= hours:
                print(f"{hours} core-hours are used: --hours MORE resumes")
                return
            tests = tests_of(edit.file)
            cost = baseline(results, folder, tests)
            target, before = folder / edit.file, (folder / edit.file).read_text()
            target.write_text(edit.code)
            try:
                record = judge(folder, tests, core_seconds=30 + 3 * cost["core_seconds"])
            finally:
                target.write_text(before)
            where = {"file": edit.file, "line": edit.line, "operator": edit.operator, "diff": edit.diff()}
            results.add({"key": edit.key, **where, **record})
            seconds = f"{record['core_seconds']} s (without it {cost['core_seconds']} s)"
            what = f"{number}/{len(edits)} {edit.file}:{edit.line} {edit.operator} {record['status']}"
            print(f"{what} in {seconds}; {results.hours():.2f} of {hours} core-hours", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=300, help="mutations to draw (default: 300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hours", type=float, default=6.0, help="core-hours in all (default: 6)")
    parser.add_argument("--output", type=Path, default=Path("mutation.jsonl"), help="result file")
    parser.add_argument("--room", default="", help="judge those in files whose paths begin so, as mgd; all are drawn")
    parser.add_argument("--report", action="store_true", help="print the results and run nothing")
    args = parser.parse_args()
    edits, results = list(draw(args.number, args.seed)), Results(args.output)
    if not args.report:
        run([edit for edit in edits if edit.file.startswith(args.room)], results, args.hours)
    report(edits, results)


if __name__ == "__main__":
    main()
