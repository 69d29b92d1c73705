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


# The rooms of the task, lowest first: each may import those before it, and mgd.
FLOORS = ("errors", "paths", "system", "options", "data", "models", "runs", "training", "pile", "reports")
BESIDE = {("pile", "training"), ("reports", "training"), ("reports", "pile")}  # rooms that leave each other alone
ENTRY_POINTS = ROOT / "classification"


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("classification.")}


def test_data_flows_down_through_the_rooms_of_the_task() -> None:
    rooms = {path.name for path in ENTRY_POINTS.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms == set(FLOORS) - {"errors", "paths"}
    for room in sorted(rooms):
        for path in sorted((ENTRY_POINTS / room).rglob("*.py")):
            used = {name.split(".")[1] for name in imported_modules(path)} - {room}
            assert used <= set(FLOORS[: FLOORS.index(room)]), f"{path} imports {used}"
            assert not {(room, other) for other in used} & BESIDE, f"{path} imports {used}"


def test_a_command_imports_rooms_and_no_other_command() -> None:
    commands = {path.stem for path in ENTRY_POINTS.glob("*.py")} - {"errors", "paths", "__init__"}
    for name in sorted(commands - {"__main__"}):
        used = {module.split(".")[1] for module in imported_modules(ENTRY_POINTS / f"{name}.py")}
        assert not used & (commands - {name}), name
