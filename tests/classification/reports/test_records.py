from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from classification.errors import UserError
from classification.reports.records import read_runs
from tests.classification.reports.made import write_flow, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", [10.0, 20.0, 30.0], weights=False)


def faults(folder: Path) -> str:
    (found,) = read_runs([folder])
    return "\n".join(found.faults)


def test_a_real_run_has_no_faults(short_run: Path) -> None:
    (found,) = read_runs([short_run])
    assert found.faults == []
    assert (len(found.epochs), len(found.matchings), found.terms) == (1, 1, ["ce", "mgd"])
    assert found.parameters is not None and found.megabytes is not None
    assert found.parameters * 4e-6 <= found.megabytes <= found.parameters * 4.3e-6
    assert set(found.digests) == {"best.pth", "last.pth"}


def test_a_run_that_was_cut_short_says_how_far_it_came(tmp_path: Path) -> None:
    assert "cut short: 2 of 5 epochs" in faults(write_run(tmp_path / "run", [1.0, 2.0], planned=5, weights=False))


def test_what_is_missing_is_named(run: Path) -> None:
    (run / "config.json").unlink()
    said = faults(run)
    for name in ("best.pth is missing", "last.pth is missing", "config.json cannot be read: No such file"):
        assert name in said


def test_broken_lines_are_named_and_the_others_kept(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1:2] = ['{"epoch": 1, "valid', "[1, 2]", '{"epoch": "2"}', "\x00"]
    path.write_bytes("\n".join(lines).encode() + b"\n\xff{\n")
    (found,) = read_runs([run])
    assert found.series("valid_top1") == [(0, 10.0), (2, 30.0)]
    said = "\n".join(found.faults)
    assert all(f"line {n} of metrics.jsonl is broken" in said for n in (2, 3, 4, 5, 7))
    assert "lacks epoch 1, counted from 0" in said


def test_numbers_that_are_not_finite_are_named_and_left_out_of_curves(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "valid_top1": NaN, "train_loss": 1' + "0" * 400 + ', "skipped_steps": 7}\n')
    (found,) = read_runs([run])
    assert found.last("valid_top1") == 30.0
    said = "\n".join(found.faults)
    assert "not finite, in train_loss, valid_top1" in said
    assert "7 steps were left out" in said


def test_a_damaged_flow_and_images_that_were_left_out_are_named(run: Path) -> None:
    write_flow(run)
    (run / "flow" / "0001.npz").write_bytes(b"no archive")
    (run / "bad_images.txt").write_text("a.png\tbroken\nb.png\tbroken\n")
    (found,) = read_runs([run])
    assert len(found.matchings) == 1
    said = "\n".join(found.faults)
    assert "flow/0001.npz is damaged" in said
    assert "2 images could not be read" in said


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"options": [], "command": 3}', '{"options": {"terms": [], "teachers": 1}}']
)
def test_any_config_is_read(run: Path, content: str) -> None:
    (run / "config.json").write_text(content)
    (found,) = read_runs([run])
    assert (found.terms, found.teachers, found.arch) == ([], [], "unknown")
    assert found.faults


def test_names_tell_folders_apart(tmp_path: Path, run: Path) -> None:
    for place in ("a/run", "b/run"):
        shutil.copytree(run, tmp_path / place)
    assert [r.name for r in read_runs([tmp_path / "a/run", tmp_path / "b/run"])] == ["a/run", "b/run"]
    assert [r.name for r in read_runs([run, tmp_path / "a" / ".." / "run"])] == ["run"]


def test_what_is_no_run_is_refused(tmp_path: Path, run: Path) -> None:
    shutil.copytree(run, tmp_path / "comparison" / "runs" / "net-alone-0")
    for path, what in (
        (tmp_path / "none", "does not exist"),
        (run / "metrics.jsonl", "is a file"),
        (tmp_path, "is no run folder.*give runs that it holds: run$"),
        (tmp_path / "comparison", "is no run folder.*give runs that it holds: runs/net-alone-0$"),
    ):
        with pytest.raises(UserError, match=what):
            read_runs([run, path])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no finished epoch"):
        read_runs([run])
