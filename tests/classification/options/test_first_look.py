"""Help and typing mistakes are answered without torch, by words that are those of the library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from classification import main_mgd
from classification.options import names
from mgd.flow import ASSIGNMENTS, SOLVERS
from mgd.losses import ChannelMatching
from mgd.losses.reduce import REDUCERS
from tests.classification.conftest import SMALL, STUDENT, TEACHER

ROOT = Path(__file__).parents[3]


def test_the_words_are_those_of_the_library() -> None:
    forms = get_args(get_type_hints(ChannelMatching.Hyper)["form"])
    assert (ASSIGNMENTS, forms) == (names.ASSIGNMENTS, names.FORMS)
    assert set(names.SOLVERS) == set(SOLVERS)
    hints = get_type_hints(ChannelMatching.Hyper)
    assert (get_args(hints["cost"]), get_args(hints["groups"])) == (names.COSTS, names.GROUPS)
    assert get_args(get_args(hints["capacity"])[0]) == names.CAPACITIES
    assert set(names.REDUCERS) == {*REDUCERS} - {"sp_mean"}


@pytest.mark.parametrize("script", ["main_base", "main_mgd"])
def test_neither_help_nor_a_typing_mistake_waits_for_torch(script: str) -> None:
    code = (
        f"import sys; from classification.{script} import main\n"
        "status = main(['--help']), main(['photos', '--archh', 'resnet18'])\n"
        "heavy = {'torch', 'torchvision', 'timm', 'scipy', 'ortools', 'numpy'} & set(sys.modules)\n"
        "assert (status, heavy) == ((0, 2), set()), (status, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ") and done.stderr.startswith(f"{script}.py: unrecognized arguments: --archh")


def test_a_run_of_own_networks_never_imports_those_of_others(photos: Path, teacher: Path, tmp_path: Path) -> None:
    """Each of these packages takes as long to import as torch."""
    pair = ["-a", STUDENT, "--teacher-arch", TEACHER, "--teacher-resume", str(teacher), "--output", str(tmp_path / "a")]
    words = [str(photos), *pair, *SMALL, "--epochs", "1", "--train-crop", "resized"]
    code = (
        f"import sys; from classification.main_mgd import main; status = main({words!r})\n"
        "heavy = {'torchvision', 'timm', 'huggingface_hub'} & set(sys.modules)\n"
        "assert (status, heavy) == (0, set()), (status, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_is_a_screen_and_help_all_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_mgd.main(["--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 32 and "--teacher-resume" in short and "--mgd-solver" not in short
    assert main_mgd.main(["--help-all"]) == 0
    whole = capsys.readouterr().out
    assert "--mgd-solver" in whole and "--help-all" in short and len(whole.splitlines()) > 100
