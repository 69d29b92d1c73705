"""The examples run as they stand, on little data; the notebook with fewer epochs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(name: str, *words: str, cwd: Path) -> list[str]:
    command = [sys.executable, str(EXAMPLES / name), *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_distil_your_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, number in (("train", 32), ("valid", 2)):
        for label in range(2):
            folder = tmp_path / "photos" / split / "ab"[label]
            folder.mkdir(parents=True)
            for place in range(number):
                pixels = rng.integers(0, 60, (32, 32, 3)) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{place}.png")
    said = run("distil_your_folder.py", "photos", "--epochs", "1", "--size", "32", cwd=tmp_path)
    assert said[0].startswith("teacher: ") and " <- " in said[1] and said[-1].startswith("epoch 1: student ")
    assert (tmp_path / "student.pth").is_file()


def test_your_own_loss(tmp_path: Path) -> None:
    said = run("your_own_loss.py", "--epochs", "3", cwd=tmp_path)
    assert [line.split(":")[0] for line in said] == ["teacher", "student alone", "student with ranking"]


def test_your_own_loss_is_a_term_module() -> None:
    from classification.options.term_module import term_classes

    assert term_classes(str(EXAMPLES / "your_own_loss.py"))["ranking"].weight == 1


def test_the_notebook_runs_and_says_what_it_says(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "digits.ipynb", as_version=4)
    assert sum(bool(cell.get("outputs")) for cell in notebook.cells) >= 6  # it is kept with what it found
    for cell in notebook.cells:
        cell.source = cell.source.replace("EPOCHS = 10", "EPOCHS = 1")
    before = [cell.source for cell in notebook.cells]
    assert any("EPOCHS = 1" in source for source in before)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "distilled" in "".join(output.get("text", "") for output in outputs)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_they_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 80
