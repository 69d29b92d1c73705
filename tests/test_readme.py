"""The README keeps its word: its Python runs, its options exist, its tables are those that the scripts make."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from classification.data.images import read_image, to_bytes
from classification.data.preprocessing import Preprocessing
from classification.models import build
from classification.options.parser import build_parser
from classification.runs.checkpoint import describe_student

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EVALUATE = (ROOT / "docs" / "start" / "device.md").read_text()


def python(line: str, page: str = README) -> str:
    """Return the one Python block of a page that has this line."""
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if line in c.splitlines())
    return str(code)


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing.of(64),
        Preprocessing.of(64, "pad"),
        Preprocessing(64, 70, "squash", "bicubic", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
    ],
)
def test_a_students_file_is_used_as_it_is_evaluated(
    preprocessing: Preprocessing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student = build("mobilenet_v1", 4)
    (tmp_path / "runs" / "student").mkdir(parents=True)
    content = describe_student(student.state_dict(), "mobilenet_v1", 4, list("abcd"), preprocessing)
    torch.save(content, tmp_path / "runs" / "student" / "best.pth")
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # as cameras write it
    Image.fromarray(noise).resize((160, 120)).save(tmp_path / "photo.jpg", exif=turned)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(python("from classification.models import build", EVALUATE), scope)
    pixels = preprocessing.transform()(to_bytes(read_image("photo.jpg")).permute(2, 0, 1))
    seen = preprocessing.normalise(pixels.permute(1, 2, 0)[None])
    torch.testing.assert_close(scope["image"], seen[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        expected = student.eval()(seen)
    torch.testing.assert_close(scope["logits"], expected)
    assert capsys.readouterr().out.strip() == "abcd"[int(expected.argmax())]


def test_the_loop_of_the_library_trains_any_pair_of_networks() -> None:
    code = python("import mgd")
    assert len(code.splitlines()) <= 15
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    scope: dict[str, Any] = {
        "student": build("mobilenet_v1", 10),
        "teacher": build("resnet18", 10),
        "images": images,
        "batches": [(images, torch.arange(4))],
        "num_images": 4,
        "epochs": 1,
    }
    exec(code.replace("224", "64"), scope)
    assert set(scope["values"]) == {"loss", "logits", "ce", "mgd", "kd"}
    assert scope["values"]["loss"].requires_grad
    shapes = [flow.matrix.shape for flow in scope["terms"]["mgd"].flows]
    assert shapes and shapes == [(ours.channels, theirs.channels) for ours, theirs in scope["pairs"]]


def test_options_in_commands_exist() -> None:
    known = {
        script: {o for action in build_parser(script, distillation=script == "main_mgd.py")._actions
                 for o in action.option_strings}
        for script in ("main_base.py", "main_mgd.py")
    }  # fmt: skip
    pages = [README, *(page.read_text() for page in sorted((ROOT / "docs" / "start").glob("*.md")))]
    typed = re.sub(r"\n(?:distil|mgd distill) ", "\npython main_mgd.py ", "\n".join(pages))
    typed = typed.replace("\nmgd train ", "\npython main_base.py ")
    commands = re.findall(r"^(?:python|torchrun) .*(main_base|main_mgd)\.py((?:.|\\\n)*?)$", typed, flags=re.MULTILINE)
    assert len(commands) >= 20
    for script, words in commands:
        for option in re.findall(r"(?<!\S)--?[a-z][a-z0-9-]*", words.split("#")[0]):
            assert option in known[f"{script}.py"], (script, option)


def test_tables_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/make_tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_files_that_it_names_are_there() -> None:
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for name in re.findall(r"\]\(((?!https?:)[^)#]+)\)", text) + re.findall(r"`(scripts/[\w.]+)[ `]", README):
        assert (ROOT / name).exists(), name
