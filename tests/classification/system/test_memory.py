from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from classification.system import memory

CODE = """
import resource, torch
from classification.system.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(9_000_000).zero_()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
keep_freed_memory()
for _ in range(4):  # the first ones still find no room
    faults()
print(first, faults())
"""


def test_large_blocks_are_given_out_again() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    if before < 1000:
        pytest.skip(f"this C library keeps blocks already ({before} page faults)")
    assert after < 0.1 * before


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    memory.keep_freed_memory()


def test_the_peak_holds_what_was_held_once() -> None:
    before = memory.peak_bytes(torch.device("cpu"))
    torch.empty(before // 4 + 100_000_000).zero_()  # four bytes each
    assert memory.peak_bytes(torch.device("cpu")) > before + 100_000_000
