from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from classification import report

ROOT = Path(__file__).parents[2]

pytest.importorskip("vl_convert")
pytest.importorskip("jinja2")


def test_a_real_run_with_its_teacher_and_images(
    short_run: Path, teacher: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.html"
    words = [str(teacher.parent), str(short_run), "--output", str(output), "--data", str(photos), "--images", "6"]
    assert report.main(words) == 0
    page = output.read_text()
    assert capsys.readouterr().out.startswith(f"=> written to {output}, ")
    assert "None found: every run has all its epochs and its checkpoints." in page
    assert "6 of the 15 validation images" in page
    gallery = page[page.index('<section id="gallery">') : page.index('<section id="classes">')]
    assert "Not drawn" not in gallery
    assert gallery.count("<h4>") == 3
    assert gallery.count('alt="student\'s map"') == 3 * 4 * 3  # stages, channels, images
    assert gallery.count('alt="teacher\'s map"') == 2 * 3 * 4 * 3


def test_help_and_mistakes_need_no_torch() -> None:
    code = "import sys; from classification.report import main; sys.exit(main({}) + 90 * ('torch' in sys.modules))"
    for words, status, said in ((["--help"], 0, "usage: report.py"), (["run", "--outptu", "x"], 2, "report.py: ")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(words)], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == status, done.stderr
        assert said in done.stdout + done.stderr
