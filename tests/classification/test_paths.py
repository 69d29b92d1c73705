from __future__ import annotations

import os

import pytest

from classification.paths import relative

PATHS = [
    "a.jpg",
    "b/a.jpg",
    "../a.jpg",
    "b/../a.jpg",
    "./a.jpg",
    "b//a.jpg",
    "/a.jpg",
    ".hidden/a",
    "b/.hidden",
    "b/",
    "",
]


@pytest.mark.parametrize("root", ["data", "/data/photos", "data/../photos", "./data", "data/", "/", "."])
def test_relative_paths_are_those_of_the_standard_library(root: str) -> None:
    for path in [*PATHS, *(f"{root}/{path}" for path in PATHS), f"{root}2/a.jpg"]:
        if path:
            assert relative(path, root) == os.path.relpath(path, root), (path, root)
