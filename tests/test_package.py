"""The wheel holds what the commands and the users' type checkers read, and its words say what is true."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    # Without isolation nothing is downloaded; the build folder of the checkout stays as it is.
    copied = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git, or no repository: the files of the project are not known")
    for name in listed.stdout.split("\0"):
        if name.startswith(("mgd/", "classification/")) or name in ("pyproject.toml", "README.md", "LICENSE"):
            (copied / name).parent.mkdir(parents=True, exist_ok=True)
            (copied / name).write_bytes((ROOT / name).read_bytes())
    words = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(copied)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("matching_guided_distillation-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_every_file_of_both_packages_is_in_it(files: set[str]) -> None:
    listed = subprocess.run(["git", "ls-files", "mgd", "classification"], cwd=ROOT, capture_output=True, text=True)
    assert set(listed.stdout.splitlines()) <= files
    assert {"mgd/py.typed", "classification/py.typed", "classification/recipes/recommended.yaml"} <= files


def test_it_holds_nothing_else(files: set[str]) -> None:
    assert {name.split("/")[0] for name in files if ".dist-info/" not in name} == {"mgd", "classification"}
