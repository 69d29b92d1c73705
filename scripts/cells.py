"""The cells of scripts/quality.yaml, transport.yaml and unlabelled.yaml: their commands, and their records.

A record counts only where its command is its cell's. Words that say where or how a run goes (`-j`, `-p`, `--output`,
`--resume`, `--teacher-threads`, folders in front of file names) may differ, for they do not change what it computes.
Under `earlier`, a suite lists commands that read otherwise and computed the same at their commit; they count there.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from results_table import Record, TableError, read_table

ROOT = Path(__file__).parents[1]
CELLS = tuple(ROOT / "scripts" / f"{name}.yaml" for name in ("quality", "transport", "unlabelled"))
RESULTS = ROOT / "results"
GIVEN_TEACHER = "cifar10_resnet56.pt"
GIVEN = "given/"  # in front of the name of a file that is not made by a cell
MADE = "made/"  # in front of the path of a file or folder that another cell made, from the folder of all suites
PLACES = ("-j", "-p", "--seed", "--output", "--resume", "--teacher-threads")  # each with one value


def read_suites(files: Iterable[Path] = CELLS) -> dict[str, dict[str, Any]]:
    """Return every suite by name."""
    return {name: suite for file in files for name, suite in yaml.safe_load(file.read_text()).items()}


def data_kind(name: str, suite: dict[str, Any]) -> str:
    """Return which images a suite trains on: cifar10, clothing or digits."""
    return str(suite.get("data", name))


def data_name(kind: str, cell: dict[str, Any]) -> str:
    """Return the name of the folder of a cell's data."""
    clothing = kind == "clothing"
    words = ["clothing" if clothing else "data", str(cell.get("per-class", "" if clothing else 1000))]
    words.append(f"held-out-{cell['held-out']}" if "held-out" in cell else "")
    return "-".join(filter(None, words))


def has_teacher(cell: dict[str, Any]) -> bool:
    """Whether a cell's command names the suite's teacher."""
    return bool(cell.get("script", "main_mgd") == "main_mgd" and cell.get("teacher", True))


def cell_words(
    suite: dict[str, Any],
    cell: dict[str, Any],
    teacher: str,
    start: str,
    *,
    given: str = "",
    made: str = "",
    seed: int = 0,
) -> list[str]:
    """Return the options of a cell, those of its seed and its place left out.

    Args:
        suite: of a list of cells.
        cell: one of its cells.
        teacher: file of the teacher's weights.
        start: file of the student's, where it starts from another cell's.
        given: what stands in the place of `given/` in front of the name of a given file.
        made: the folder that stands in the place of `made/`; without one, only the last name of such a path stays.
        seed: stands in the place of {seed} in such a path.
    """
    options = shlex.split(f"{suite.get('base', '')} {cell.get('options', '')}")
    words = [f"{given}{word.removeprefix(GIVEN)}" if word.startswith(GIVEN) else word for word in options]
    for place, word in enumerate(words):
        if word.startswith(MADE):
            path = word.removeprefix(MADE).replace("{seed}", str(seed))
            words[place] = f"{made}/{path}" if made else Path(path).name
    if has_teacher(cell):
        words += [*shlex.split(suite.get("teacher", "")), "--teacher-resume", teacher]
    return [*words, "--student-resume", start] if "start" in cell else words


def earlier(suite: dict[str, Any], record: Record) -> list[dict[str, Any]]:
    """Return the entries of `earlier` that speak of a record."""
    commit = record.commit or ""
    return [
        entry
        for entry in suite.get("earlier", [])
        if record.cell in entry["cells"] and any(commit.startswith(known) for known in entry["commits"])
    ]


def check_command(name: str, suite: dict[str, Any], record: Record) -> None:
    """Refuse a record whose command is not its cell's.

    Raises:
        TableError: it is not.
    """
    where = f"results/{name}.csv: {record.cell}, seed {record.seed}"
    if record.cell not in suite["cells"]:
        raise TableError(f"{where}: there is no such cell in its list")
    cell, data = dict(suite["cells"][record.cell]), None
    for entry in earlier(suite, record):
        cell["options"] = cell.get("options", "").replace(entry.get("now", ""), entry.get("then", ""))
        data = entry.get("data", data)
    teacher = "last.pth" if suite.get("teacher-cell") else GIVEN_TEACHER
    script = f"{cell.get('script', 'main_mgd')}.py"
    kind = data_kind(name, suite)
    wanted = [script, data or data_name(kind, cell), *cell_words(suite, cell, teacher, "last.pth")]
    found, places = _apart([Path(word).name if word.startswith("/") else word for word in record.words])
    if found != wanted:
        raise TableError(
            f"{where}: its command is not that of its cell: run it again, or list it under "
            f"`earlier` where it computed the same\n  record: {shlex.join(found)}\n  cell:   {shlex.join(wanted)}"
        )
    if places.get("--seed") != str(record.seed):
        raise TableError(f"{where}: its command has seed {places.get('--seed')}")


def _apart(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Split a command into what it computes, and where and how."""
    found, places, rest = [], {}, iter(words)
    for word in rest:
        if word in PLACES:
            places[word] = next(rest, "")
        else:
            found.append(word)
    return found, places


@cache
def read_quality() -> tuple[dict[str, dict[str, Any]], dict[str, dict[int, Record]]]:
    """Return the layout of every cell, and its records by seed.

    Raises:
        TableError: a table is not as it should be, or a record has another command than its cell.
    """
    suites = read_suites()
    cells = {name: cell for suite in suites.values() for name, cell in suite["cells"].items()}
    records: dict[str, dict[int, Record]] = defaultdict(dict)
    for name, suite in suites.items():
        for record in read_table(RESULTS / f"{name}.csv") if (RESULTS / f"{name}.csv").exists() else ():
            check_command(name, suite, record)
            records[record.cell][record.seed] = record
    return cells, records


def count(found: dict[int, Record]) -> str:
    """How many seeds, and in brackets how many of them on a processor without bfloat16."""
    float32 = sum(not r.had_bfloat16 for r in found.values())
    return f"{len(found)} ({float32}*)" if float32 else f"{len(found)}"


def differences(values: list[float]) -> str:
    """Mean of paired differences and its standard error; fewer than three, each."""
    if len(values) < 3:
        return ", ".join(f"{value:+.2f}" for value in values)
    return f"{mean(values):+.2f} ± {stdev(values) / len(values) ** 0.5:.2f}"


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{values[0]:.2f}" if len(values) == 1 else f"{mean(values):.2f} ± {stdev(values):.2f}"


def top1(found: dict[int, Record]) -> str:
    """Mean and standard deviation of the top-1 after the last epoch; empty without records."""
    return spread([record.last_top1 for record in found.values()]) if found else ""
