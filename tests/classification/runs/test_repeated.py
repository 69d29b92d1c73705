"""Runs as processes of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from classification.errors import RunError
from classification.runs.repeated import Command, is_done, last_top1, run_all, warnings_in


def command(tmp_path: Path, *words: str, folder: Path | None = None) -> Command:
    return Command("main_base", words, 0, folder or tmp_path / "run", tmp_path / "run.log")


def test_a_run_that_is_done_is_not_run_again(short_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(short_run, tmp_path / "short"))
    assert is_done(folder) and not is_done(tmp_path)
    done = command(tmp_path, "nothing that could be run", folder=folder)
    assert list(run_all([done], jobs=1, threads=1)) == [done]
    assert not done.log.exists() and 0 <= last_top1(folder) <= 100


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    bad = command(tmp_path, "photos", "--epoch", "3")
    with pytest.raises(
        RunError, match=r"run ended with status 2: main_base.py: unrecognized arguments: --epoch 3; close"
    ):
        list(run_all([bad], jobs=2, threads=1))


def test_warnings_are_found_in_what_a_run_printed(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert warnings_in(log) == []
    log.write_text("epoch 1\n!! WARNING: the teacher is near chance\nepoch 2\n!! WARNING: the teacher is near chance\n")
    assert warnings_in(log) == ["!! WARNING: the teacher is near chance"]
