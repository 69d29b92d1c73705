"""The rooms of the house: who may import whom, and what does not belong where."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each room may import of the project's own rooms; arrows point down only.
MAY = {"mgd": {"mgd"}, "classification": {"mgd", "classification"}}
# What the rooms of mgd/ may import of others beside torch.
OUTSIDE = {
    "flow": {"numpy", "scipy", "ortools"},
    "huggingface": {"transformers", "accelerate", "sklearn", "numpy", "random", "pathlib"},
}
STANDARD = {
    "__future__",
    "argparse",
    "collections",
    "concurrent",
    "contextlib",
    "copy",
    "dataclasses",
    "difflib",
    "functools",
    "inspect",
    "itertools",
    "math",
    "re",
    "time",
    "typing",
    "warnings",
}
ROOMS = {"mgd", "classification", "scripts", "tests"}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("room", sorted(MAY))
def test_arrows_point_down(room: str) -> None:
    assert sources(room)
    for path in sources(room):
        assert imports(path) & ROOMS <= MAY[room], path


def test_the_method_imports_only_what_its_design_allows() -> None:
    for path in sources("mgd"):
        allowed = {"mgd", "torch", *STANDARD, *OUTSIDE.get(path.parent.name, ())}
        # Whether oneDNN may use bfloat16 stands in the environment, which the teachers' room alone reads.
        allowed |= {"os"} if path.parent.name == "teachers" else set()
        assert imports(path) <= allowed, path


def test_the_method_prints_nothing_and_there_is_no_utils() -> None:
    for path in sources("mgd"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "open"), f"{path}:{node.lineno}"
    assert not [p for room in ROOMS for p in sources(room) if "util" in p.stem]


def test_files_stay_short() -> None:
    long = {str(p): n for room in ROOMS for p in sources(room) if (n := len(p.read_text().splitlines())) > 400}
    assert not long
