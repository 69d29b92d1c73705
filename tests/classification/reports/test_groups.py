from __future__ import annotations

import re
from pathlib import Path

import pytest

from classification.reports.groups import CONTROL, TEACHER, Member, compare_with_controls, find_unfair, group_runs
from classification.reports.records import read_runs
from tests.classification.reports.made import write_run, write_weights


def members(*folders: Path) -> list[Member]:
    return group_runs(read_runs(folders))


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    write_run(tmp_path / "teacher", [90.0], weights=False)
    return write_weights(tmp_path / "teacher" / "best.pth", "cifar_resnet8")


def pair(root: Path, teacher: Path, ours: list[float], theirs: list[float], **options: int) -> list[Path]:
    """Write a distilled run and one alone per seed."""
    return [
        write_run(
            root / f"{name}-{seed}", [top1], seed=seed, teacher=guide, weights=False, **(options if guide else {})
        )
        for name, guide, values in (("distilled", teacher, ours), ("alone", None, theirs))
        for seed, top1 in enumerate(values)
    ]


def test_seeds_share_a_group_and_those_alone_are_gray(tmp_path: Path, teacher: Path) -> None:
    found = members(teacher.parent, *pair(tmp_path, teacher, [80.0, 81.0], [70.0, 71.0]))
    assert [(m.run.name, m.role) for m in found] == [
        ("distilled-0", "distilled"), ("distilled-1", "distilled"), ("alone-0", "alone"), ("alone-1", "alone"),
        ("teacher", "teacher"),
    ]  # fmt: skip
    assert [m.group for m in found] == ["ce + mgd"] * 2 + ["alone"] * 2 + ["teacher cifar_resnet8_w0.5"]
    assert [m.colour for m in found] == ["var(--c0)"] * 2 + [CONTROL] * 2 + [TEACHER]


def test_recipes_that_differ_in_an_option_are_apart(tmp_path: Path, teacher: Path) -> None:
    runs = [write_run(tmp_path / f"lr{lr}", [80.0], teacher=teacher, weights=False, lr=lr) for lr in (0.1, 0.2)]
    found = members(*runs)
    assert [m.group for m in found] == ["ce + mgd (lr 0.1)", "ce + mgd (lr 0.2)"]
    assert [m.colour for m in found] == ["var(--c0)", "var(--c1)"]


def test_without_a_distilled_run_those_alone_have_colours(tmp_path: Path) -> None:
    (found,) = members(write_run(tmp_path / "run", [50.0], weights=False))
    assert (found.role, found.colour) == ("alone", "var(--c0)")
    assert compare_with_controls([found]) == (
        "run reaches 50.00 % top-1 after 1 epochs.\nNo run was distilled, so there is nothing to compare."
    )


@pytest.mark.parametrize(
    ("ours", "what"),
    [
        # The t-quantile of two degrees of freedom is 4.3027; differences of standard deviation 1 give +- 2.484.
        ([72.0, 73.0, 74.0], "BETTER: ce + mgd reaches 73.00 % top-1, the same student alone 70.00 %; +3.00 points, "
         "95 % interval +0.52 to +5.48 over 3 paired seeds."),
        ([66.0, 67.0, 68.0], "WORSE: .*-3.00 points, 95 % interval -5.48 to -0.52"),
        ([71.0, 72.0, 73.0], r"UNDECIDED: .*\+2.00 points, 95 % interval -0.48 to \+4.48"),
        # The only step that can be seen is 2 points; rounding to it has the deviation 2 / sqrt(6) = 0.816.
        ([72.0, 72.0, 72.0], r"UNDECIDED: .*\+2.00 points, 95 % interval -0.03 to \+4.03"),
    ],
)  # fmt: skip
def test_the_verdict_is_the_paired_interval(tmp_path: Path, teacher: Path, ours: list[float], what: str) -> None:
    said = compare_with_controls(members(*pair(tmp_path, teacher, ours, [70.0, 70.0, 70.0])))
    assert re.match(what.replace("+", r"\+") if what.startswith("BETTER") else what, said), said


def test_one_seed_decides_nothing_and_no_control_is_said(tmp_path: Path, teacher: Path) -> None:
    folders = pair(tmp_path, teacher, [90.0], [70.0])
    assert compare_with_controls(members(*folders)).endswith("+20.00 points on one seed, which decides nothing.")
    assert "there is no complete run of the same student alone" in compare_with_controls(members(folders[0]))


def test_a_run_that_was_cut_short_does_not_count(tmp_path: Path, teacher: Path) -> None:
    cut = write_run(tmp_path / "cut", [1.0], planned=2, teacher=teacher, weights=False)
    whole = write_run(tmp_path / "alone", [70.0, 71.0], weights=False)
    assert compare_with_controls(members(cut, whole)) == "ce + mgd: no run is complete."


def test_a_control_of_another_budget_is_named(tmp_path: Path, teacher: Path) -> None:
    assert find_unfair(members(*pair(tmp_path / "same", teacher, [80.0], [70.0]))) == {}
    other = members(*pair(tmp_path / "other", teacher, [80.0], [70.0], batch_size=7))
    assert find_unfair(other) == {"ce + mgd": "alone-0 and distilled-0 differ in batch_size (None, then 7)"}
    assert compare_with_controls(other).endswith("decides nothing. Other options differ as well, see Failures.")


def test_the_control_is_that_of_the_same_budget(tmp_path: Path, teacher: Path) -> None:
    longer = write_run(tmp_path / "longer", [99.0], weights=False, batch_size=7)
    assert "alone 70.00 %" in compare_with_controls(members(longer, *pair(tmp_path, teacher, [80.0], [70.0])))


def test_a_data_folder_is_the_same_from_anywhere(tmp_path: Path, teacher: Path) -> None:
    ours = write_run(tmp_path / "distilled", [80.0], teacher=teacher, weights=False, data=str(tmp_path / "photos"))
    theirs = write_run(tmp_path / "alone", [70.0], weights=False, data="photos")  # started in tmp_path
    assert find_unfair(members(ours, theirs)) == {}
