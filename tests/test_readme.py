"""The README keeps its word: its Python runs, its options exist, its tables are those that the scripts make."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from classification.options import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_quick_start_of_the_library_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip() and not line.lstrip().startswith(("#", "import"))]
    assert len(lines) <= 24
    fresh = torchvision.models.resnet50().state_dict()
    kind = type(torchvision.models.ResNet50_Weights.IMAGENET1K_V1)
    monkeypatch.setattr(kind, "get_state_dict", lambda *_, **__: fresh)
    scope: dict[str, object] = {}
    before = torch.get_rng_state()
    exec(code, scope)
    torch.set_rng_state(before)
    assert torch.isfinite(scope["values"]["loss"])
    assert [flow.matrix.shape for flow in scope["flows"]] == [(192, 512), (576, 1024), (960, 2048)]


def test_options_in_commands_exist() -> None:
    known = {
        script: {o for action in build_parser(script, distillation=script == "main_mgd.py")._actions
                 for o in action.option_strings}
        for script in ("main_base.py", "main_mgd.py")
    }  # fmt: skip
    commands = re.findall(r"^(?:python|torchrun) .*(main_base|main_mgd)\.py((?:.|\\\n)*?)$", README, flags=re.MULTILINE)
    assert len(commands) >= 10
    for script, words in commands:
        for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", words.split("#")[0]):
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
