"""The word `mgd`: its screen, its typing mistakes, and which script does what."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from classification import __main__ as shell
from classification.errors import UserError
from classification.options import evaluating

ROOT = Path(__file__).parents[2]


def test_help_is_one_screen_and_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from classification.__main__ import main\n"
        "status = main(['--help']), main(['evalute']), main(['evaluate', '--help']), main(['train', '--help'])\n"
        "heavy = {'torch', 'torchvision', 'timm', 'numpy'} & set(sys.modules)\n"
        "assert (status, heavy) == ((0, 2, 0, 0), set()), (status, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "mgd: unknown command 'evalute'; close ones are evaluate\n"
    screen = shell.screen().splitlines()
    assert len(screen) <= 24 and max(map(len, screen)) <= 110


def test_it_is_what_an_installation_calls(capsys: pytest.CaptureFixture[str]) -> None:
    assert 'mgd = "classification.__main__:main"' in (ROOT / "pyproject.toml").read_text()
    assert shell.main([]) == 2 and capsys.readouterr().err.startswith("usage: mgd COMMAND")
    done = subprocess.run([sys.executable, "-m", "classification", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: mgd COMMAND")


@pytest.mark.parametrize("name", sorted(shell.COMMANDS))
def test_a_word_is_listed_where_its_script_is_there(name: str) -> None:
    there = (ROOT / "classification" / f"{shell.COMMANDS[name].module}.py").exists()
    assert (f"\n  {name} " in shell.screen()) == there
    if not there:
        with pytest.raises(UserError, match=f"unknown command '{name}'"):
            shell.find(name)


def test_words_reach_their_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.main(["train", "nowhere", "-j", "0"]) == 2
    assert capsys.readouterr().err == (
        "mgd train: data folder nowhere does not exist: give one with train/CLASS and valid/CLASS, as mgd prepare "
        "makes it\n"
    )
    for task in ("score", "select"):
        assert shell.main([task, "nowhere", "nowhere", "--output", "new"]) == 2
        assert capsys.readouterr().err.startswith(f"mgd {task}: ")
    assert shell.main(["taps", "nowhere", "--show-tapss"]) == 2
    assert "mgd taps: unrecognized arguments: --show-tapss; close ones are --show-taps" in capsys.readouterr().err


def test_evaluate_is_the_published_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "best.pth").touch()
    published = ["photos", "--evaluate", "--student-resume", str(run / "best.pth")]
    assert evaluating.translate([str(run), "photos"], "mgd evaluate") == ("main_base", published)
    words = [str(run), "-b", "8", "photos", "--teacher", "a.pth", "--workers", "0", "--valid-list", "list"]
    more = ["--teacher-resume", "a.pth", "--valid-list", "list", "--batch-size", "8", "--workers", "0"]
    assert evaluating.translate(words, "mgd evaluate") == ("main_base", published + more)
    assert shell.main(["evaluate", str(run)]) == 2
    assert capsys.readouterr().err == "mgd evaluate: the following arguments are required: DIR\n"
    script, found = evaluating.translate([*words, "--teacher", "b.pth"], "mgd evaluate")
    assert script == "main_mgd" and "a.pth,b.pth" in found
    with pytest.raises(UserError, match=r"has no best.pth: give a file of weights"):
        evaluating.translate([str(tmp_path), "photos"], "mgd evaluate")


def test_a_checkpoint_says_all_that_evaluation_asks(photos: Path, teacher: Path, tmp_path: Path) -> None:
    """Network, size and classes are those of the file; nothing is typed twice."""
    words = ["evaluate", str(teacher.parent), str(photos), "--teacher", str(teacher), "--output", str(tmp_path)]
    assert shell.main([*words, "-j", "0"]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["student"]["arch"] == found["teacher"]["arch"] == "cifar_resnet8"
    assert found["student"]["compared"]["teacher"]["agreement"] == 100
