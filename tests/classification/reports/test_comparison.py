"""What is compared, and when it ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from classification.errors import UserError
from classification.reports.comparison import (
    Plan,
    Recipe,
    describe_verdict,
    judge_all,
    save_comparison,
    save_plan,
    table,
    undecided_pairs,
)

PLAN = Plan("photos", ("net",), tuple(map(Recipe.of, ("kd", "alone", "ofd"))), 5, 0.95, 0.5, 0.1, ("--epochs", "3"))
FOUND = {
    ("net", "alone"): {0: 70.0, 1: 71.0, 2: 69.0},
    ("net", "kd"): {0: 71.0, 1: 70.0, 2: 70.5},
    ("net", "ofd"): {0: 80.0, 1: 81.1, 2: 79.1},
}


def test_recipes_are_words_of_the_main_scripts(tmp_path: Path) -> None:
    assert Recipe.of("alone") == Recipe("alone", "main_base")
    assert Recipe.of("mgd+ofd").words == ("--distiller", "mgd+ofd")
    own = Recipe.of("recommended")
    assert own.script == "main_mgd" and own.words[0] == "--config" and Path(own.words[1]).is_file()
    (tmp_path / "mine.yaml").write_text("distiller: kd\n")
    assert Recipe.of(str(tmp_path / "mine.yaml")).name == "mine"
    with pytest.raises(UserError, match="there is no such file"):
        Recipe.of("theirs.yaml")


def test_the_control_shares_all_but_the_teacher() -> None:
    plan = replace(PLAN, teacher=("--teacher-resume", "T.pth"))
    alone, kd = (plan.words_of(("net", name)) for name in ("alone", "kd"))
    assert alone == ("main_base", ("photos", "--epochs", "3", "-a", "net"))
    assert kd == (
        "main_mgd",
        ("photos", "--epochs", "3", "--distiller", "kd", "-a", "net", "--teacher-resume", "T.pth"),
    )
    assert plan.pairs()[0] == ("net", "alone")
    command = plan.command(Path("out"), ("net", "kd"), 4)
    assert command.typed()[-6:] == ["--seed", "4", "--output", "out/runs/net-kd-4", "--resume", "auto"]


def test_a_plan_without_control_or_with_one_twice_is_refused() -> None:
    with pytest.raises(
        UserError, match="--recipes kd: expected alone and at least one other, which is compared with it"
    ):
        replace(PLAN, recipes=(Recipe.of("kd"),))
    with pytest.raises(UserError, match="--students names net twice"):
        replace(PLAN, students=("net", "net"))


def test_a_decided_recipe_ends_and_the_others_go_on_with_their_control() -> None:
    verdicts = judge_all(PLAN, FOUND)
    assert verdicts["net", "ofd"].word == "BETTER" and verdicts["net", "kd"].word == "UNDECIDED"
    assert verdicts["net", "ofd"].difference == pytest.approx((10 + 10.1 + 10.1) / 3)
    assert undecided_pairs(PLAN, verdicts) == [("net", "alone"), ("net", "kd")]
    assert undecided_pairs(PLAN, {pair: verdicts["net", "ofd"] for pair in verdicts}) == []
    assert undecided_pairs(PLAN, {}) == PLAN.pairs()


def test_seeds_that_the_control_lacks_do_not_count() -> None:
    found = {("net", "alone"): {0: 70.0}, ("net", "kd"): {0: 71.5, 1: 99.0}}
    verdict = judge_all(PLAN, found)["net", "kd"]
    assert verdict.seeds == 1 and verdict.difference == 1.5 and verdict.interval[1] == float("inf")
    assert describe_verdict(verdict, ("net", "kd"), 0.95) == (
        "UNDECIDED: kd with net: +1.50 points of top-1 against alone (95 % interval unknown, 1 seed)"
    )


def test_files(tmp_path: Path) -> None:
    verdicts = judge_all(PLAN, FOUND)
    save_comparison(PLAN, FOUND, verdicts, tmp_path)
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert {run["recipe"] for run in content["runs"]} == {"alone", "kd", "ofd"} and len(content["runs"]) == 9
    ofd = next(found for found in content["comparisons"] if found["recipe"] == "ofd")
    assert ofd["verdict"] == "BETTER" and ofd["interval"][0] > 0 and ofd["seeds"] == 3
    text = (tmp_path / "comparison.md").read_text()
    assert text.startswith(table(PLAN, FOUND, verdicts)) and "| net | alone | 70.00 ± 1.00 | 3 |  |  |  |" in text


def test_another_plan_in_the_folder_is_refused(tmp_path: Path) -> None:
    assert not save_plan(PLAN, tmp_path)
    assert save_plan(PLAN, tmp_path)
    with pytest.raises(
        UserError, match="holds a comparison with other seeds, options of training: type the line that began it"
    ):
        save_plan(replace(PLAN, seeds=6, words=()), tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        save_plan(PLAN, tmp_path)
