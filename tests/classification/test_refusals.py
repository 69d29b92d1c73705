"""Every bad input of `refusals/` is refused in one sentence; docs/reference/refusals.md lists what is said.

WRITE_REFUSALS=1 writes that file anew.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.classification.refusals import (
    Case,
    Place,
    checkpoints,
    commands,
    folders,
    huggingface,
    images,
    lists,
    options,
    pile,
    recipes,
    reports,
    room,
    stored,
    terms,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "refusals.md"
MODULES = (
    *(images, folders, checkpoints, options, recipes, lists, terms),
    *(commands, reports, huggingface, pile, stored),
)
GROUPS: dict[str, list[Case]] = {module.__name__.rpartition(".")[2]: module.CASES for module in MODULES}
ALL = [(group, case) for group, cases in GROUPS.items() for case in cases]
CASES = [pytest.param(*pair, id=f"{pair[0]}: {pair[1].what}") for pair in ALL]
PROCESSES = [pytest.param(*pair, id=pair[1].what) for pair in ALL if pair[1].process]
HEAD = """# What is refused, and in which words

Made and checked by `tests/classification/test_refusals.py`; `WRITE_REFUSALS=1` before pytest writes it anew. `TMP`,
`PHOTOS`, `TEACHER` and `RUN` stand for folders of the test.

| group | input | message | status |
|---|---|---|---|
"""


@pytest.fixture
def place(photos: Path, teacher: Path, short_run: Path, tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path, photos, teacher, short_run)
    yield place
    for other in place.others:
        with other:
            other.kill()


@pytest.fixture(scope="session")
def table() -> Iterator[dict[tuple[str, str], str]]:
    """The rows of the page by group and input; with WRITE_REFUSALS those that are found, written at the end."""
    rows: dict[tuple[str, str], str] = {}
    writing = "WRITE_REFUSALS" in os.environ
    for line in [] if writing else PAGE.read_text().removeprefix(HEAD).splitlines():
        group, what = line.removeprefix("| ").split(" | ")[:2]
        rows[group, what] = line
    yield rows
    if writing:
        known = [rows[group, case.what] for group, case in ALL]
        PAGE.write_text(HEAD + "".join(f"{line}\n" for line in known))


def row(group: str, case: Case, message: str, place: Place) -> str:
    names = {place.root: "TMP", place.photos: "PHOTOS", place.teacher.parent: "TEACHER", place.run: "RUN", ROOT: "REPO"}
    for path, name in sorted(names.items(), key=lambda item: -len(str(item[0]))):
        message = message.replace(str(path), name)
    message = re.sub(r"(.)\1{98,}", r"\1\1\1...", message)
    return f"| {group} | {case.what} | {message.replace('|', chr(92) + '|')} | {case.status} |"


def files(root: Path) -> dict[Path, str]:
    """What training writes, and the hash of each."""
    names = ("last.pth", "best.pth", "metrics.jsonl")
    found = [path for path in root.rglob("*") if path.name in names]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def check(case: Case, status: int, output: str, error: str, before: dict[Path, str], root: Path) -> str:
    """Check what a run left and said; return its message."""
    assert "Traceback" not in output + error, error
    assert status == case.status, error
    prog = case.script.PROG
    said = re.fullmatch(rf"{prog}(?: score| select)?: ([^\n]+)\n", error)
    assert said is not None, error
    after = files(root)
    assert {path: after.get(path) for path in before} == before
    assert {path for path in after if path.name == "metrics.jsonl"} <= set(before), "it trained"
    assert not (root / "was_run").exists(), "it ran the code in a file"
    return said[1]


@pytest.mark.parametrize(("group", "case"), CASES)
def test_it_is_refused_in_one_sentence(
    group: str,
    case: Case,
    place: Place,
    table: dict[tuple[str, str], str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = case.words(place)
    before = files(place.root)
    monkeypatch.chdir(place.root)
    capfd.readouterr()
    with room(case.room):
        status = case.script.main(words)
    message = check(case, status, *capfd.readouterr(), before, place.root)
    found = row(group, case, message, place)
    assert table.setdefault((group, case.what), found if "WRITE_REFUSALS" in os.environ else "") == found


@pytest.mark.parametrize(("group", "case"), PROCESSES)
def test_a_process_says_the_same(group: str, case: Case, place: Place, table: dict[tuple[str, str], str]) -> None:
    words = case.words(place)
    before = files(place.root)
    command = [sys.executable, str(ROOT / "classification" / case.script.PROG), *words]
    done = subprocess.run(command, cwd=place.root, capture_output=True, text=True, timeout=120)
    message = check(case, done.returncode, done.stdout, done.stderr, before, place.root)
    assert table[group, case.what] == row(group, case, message, place)


def test_there_are_enough_cases_and_the_page_has_no_others() -> None:
    assert len(ALL) >= 60 and min(map(len, GROUPS.values())) >= 8
    assert len(PROCESSES) >= 10
    inputs = [line.split(" | ")[1] for line in PAGE.read_text().removeprefix(HEAD).splitlines()]
    assert inputs == [case.what for _, case in ALL]
    assert len(set(inputs)) == len(inputs)
