"""How this process keeps and measures its memory."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys

import torch

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
