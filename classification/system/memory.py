"""How this process keeps and measures its memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# A group's limit, what it uses, and which line of memory.stat counts files that would make room: cgroups 2, and 1.
GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """Have the C library keep large blocks that are freed, and give them out again.

    It would return every block of a batch's maps to the system, and take the next one page by page: a fifth of the time
    of a step on a processor. Where the library is not glibc, nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process held at once: of its GPU's, or else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_bytes(processes: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory that can be had without swapping, in this container; half of the machine's where nothing says.

    A container's limit is that of a control group: the memory of the machine may be larger.

    Args:
        processes: where the system tells of itself.
        groups: where it tells of control groups.
    """
    rooms = [_room(folder, *names) for folder, names in _groups(processes, groups)]
    try:
        with (processes / "meminfo").open() as file:
            lines = dict(line.split(":") for line in file)
        machine = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min([machine, *(room for room in rooms if room is not None)])


def _groups(processes: Path, groups: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield the folders of the groups of this process, each and those above it, and the names of their files."""
    try:
        lines = (processes / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = groups / "memory" if controllers else groups
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            yield folder, GROUP_FILES[bool(controllers)]
            if folder == top:
                break


def _room(folder: Path, limit: str, usage: str, files: str) -> int | None:
    """Return what a group may still use; None where it has no limit, or does not say."""
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())  # "max": no limit
        counted = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(0, most - used + int(counted.get(files, 0)))
