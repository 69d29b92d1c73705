from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

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


MEBI = 2**20


@pytest.mark.parametrize(
    ("group", "files", "free"),
    [
        ("0::/", {"memory.max": "max", "memory.current": "5", "memory.stat": "inactive_file 1"}, 900),
        # a container of 600 MiB that uses 200, of them 50 for files that would be dropped
        ("0::/", {"memory.max": 600, "memory.current": 200, "memory.stat": "anon 9\ninactive_file 50"}, 450),
        # the limit of a group above
        ("0::/pod/one", {"pod/memory.max": 300, "pod/memory.current": 100, "pod/memory.stat": "inactive_file 0"}, 200),
        ("0::/pod", {"memory.max": 300, "memory.current": 400, "memory.stat": "inactive_file 0"}, 0),
        (
            "5:cpu:/x\n4:hugetlb,memory:/docker/7",  # which the container does not see
            {
                "memory/memory.limit_in_bytes": 500,
                "memory/memory.usage_in_bytes": 100,
                "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 20",
            },
            420,
        ),
        ("3:cpu:/x", {"memory.max": "", "memory.stat": ""}, 900),
    ],
)
def test_a_container_has_what_its_group_may_use(
    group: str, files: dict[str, str | int], free: int, tmp_path: Path
) -> None:
    def text(value: str | int) -> str:
        return str(value * MEBI) if isinstance(value, int) else re.sub(r"\d+$", lambda m: str(int(m[0]) * MEBI), value)

    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {900 * 1024} kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(f"{group}\n")
    for name, value in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(value))
    assert memory.free_bytes(tmp_path / "proc", tmp_path / "groups") == free * MEBI


def test_where_the_system_says_nothing_half_of_the_machine_is_free(tmp_path: Path) -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory.free_bytes(tmp_path, tmp_path) == whole // 2
