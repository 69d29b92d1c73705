"""compare.py from its command line to its verdicts."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from classification import compare, prepare
from classification.errors import UserError
from tests.classification.conftest import STUDENT

WORDS = ["--img-size", "16", "-b", "8", "-j", "0", "--train-crop", "pad", "--lr", "0.05"]


def line(photos: Path, teacher: Path, output: Path, *more: str) -> list[str]:
    shared = ["--students", STUDENT, "--teacher", str(teacher), *WORDS, "--output", str(output)]
    return [
        str(photos),
        *shared,
        "--threads",
        "1",
        "--seeds",
        "2",
        "--recipes",
        "kd",
        *more,
    ]  # alone is there by itself


def test_a_comparison_ends_with_a_verdict_and_is_kept(
    photos: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line(photos, teacher, tmp_path / "out", "--jobs", "2", "--epochs", "1")
    assert compare.main(words) == 0
    said = capsys.readouterr().out.splitlines()
    assert re.match(r"=> 4 runs at most \(2 per seed\): about 0:\d\d:\d\d at most, .* of memory, .* of disk", said[0])
    verdict = said[-1].partition(":")[0]
    assert verdict in ("BETTER", "NO DIFFERENCE", "WORSE", "UNDECIDED") and f"kd with {STUDENT}" in said[-1]
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["comparisons"][0]["verdict"] == verdict and len(content["runs"]) == 4
    for run in content["runs"]:
        options = json.loads((tmp_path / "out" / run["folder"] / "config.json").read_text())["options"]
        assert (options["seed"], options["epochs"], options["batch_size"]) == (run["seed"], 1, 8)
        assert (options.get("distiller") == "kd") == (run["recipe"] == "kd")
    assert compare.main(words) == 0  # all is there
    again = capsys.readouterr().out.splitlines()
    assert again[-1] == said[-1] and "runs at most" not in again[0]
    assert compare.main([*words, "--margin", "1"]) == 2
    assert "holds a comparison with other margin" in capsys.readouterr().err


def test_names_that_are_joined_by_commas_are_refused(photos: Path, tmp_path: Path) -> None:
    words = ["--students", STUDENT, "--recipes", "ofd,mgd+ofd", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"separate them by spaces, as in --recipes ofd mgd\+ofd$"):
        compare.plan_of(compare.parse([str(photos), *words]))


def test_a_run_folder_is_taken_as_the_teacher(photos: Path, teacher: Path, tmp_path: Path) -> None:
    plan, _ = compare.plan_of(compare.parse(line(photos, teacher.parent, tmp_path / "out")))
    assert plan.teacher[:2] == ("--teacher-resume", str(teacher))
    assert plan == compare.plan_of(compare.parse(line(photos, teacher, tmp_path / "out")))[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epoch", "2"], "unrecognized arguments: --epoch; close ones are --epochs"),
        (["--seed", "3"], "--seed belongs to a single run"),
        (["--seeds", "1"], "expected a whole number at least 2"),
        (["--recipes", "alone"], "--recipes alone: expected alone and at least one other, which is compared with it"),
        (["--recipes", "recomended"], "there is no such recipe; close is recommended"),
        (["--recipes", "alone", "kdd"], "unknown distiller 'kdd'"),
        (["--recipes", "alone", "none.yaml"], "there is no such file"),
        (["--recipes", "alone", "cifar100_resnet20_kd"], "type --epochs N, so that all have the same budget"),
        (["--teacher-epochs", "3"], "--teacher-epochs has no effect"),
        (["--lr-drop-ratio", "0.5", "--lr-schedule", "cosine"], "--lr-drop-ratio has no effect here"),
    ],
)
def test_mistakes_are_said_in_one_line_before_anything_is_written(
    more: list[str], message: str, photos: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line(photos, teacher, tmp_path / "out", *more)
    assert compare.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare.py: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(
    photos: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").touch()
    assert compare.main(line(photos, teacher, tmp_path)) == 2
    assert "contains files that are not of a comparison" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_help_is_short_and_needs_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "--recipes" in said and "--margin" in said and len(said.splitlines()) < 60


def test_the_commands_of_its_page_are_understood() -> None:
    folder = Path(compare.__file__).parents[1] / "docs" / "start"
    page = "".join((folder / name).read_text() for name in ("compare.md", "photographs.md")).replace("\\\n", " ")
    typed = re.findall(r"^mgd ((?:compare photos|prepare FOLDER) .*)$", page, flags=re.MULTILINE)
    commands = [shlex.split(found) for found in typed]
    assert [words[0] for words in commands] == ["compare", "prepare"]
    asked = compare.parse(commands[0][1:])
    assert (
        asked.own.students == ["mobilenet_v1"]
        and "--learning-rate=0.02" in asked.words
        and "--epochs=15" in asked.words
    )
    prepare.check(prepare.build_parser().parse_args([str(Path(__file__).parent), *commands[1][2:]]), commands[1])
