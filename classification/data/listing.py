"""Cache the list of images of a large folder in a file, which is valid until a folder changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

import numpy as np
from numpy.typing import NDArray

from classification.data.folders import DataFolder
from classification.data.samples import Samples, samples_digest

NAME = ".listing"  # prefix of the names of cache files
FORMAT = 1
PARTS = ("bytes", "ends", "targets")  # of `Samples`
LARGE = 20_000  # images; listing fewer takes less than half a second
SETTLING_TIME = 2.0  # seconds; file systems keep times so coarsely that a later change could have the same time
LOCK_TIMEOUT = 900.0  # seconds to wait for another process that lists the folder


def list_cached(
    read: Callable[[], DataFolder],
    cache_folder: Path | None,
    root: str | Path,
    settings: Sequence[Any],
    *,
    shared: bool,
) -> DataFolder:
    """Return `read()`, or its cached result if nothing that it read has changed since.

    The result is cached if the folder is large or other processes wait for it. It is valid while every folder and list
    that was read is the same file with the same times. A folder that changed just before it was read is read again.

    Args:
        read: lists the folder.
        cache_folder: folder of the cache files, or None to cache nothing.
        root: the data folder.
        settings: everything else that `read` depends on.
        shared: whether other processes list the same folder now; then one lists it, and the others wait.
    """
    if cache_folder is None:
        return read()
    key = json.dumps([FORMAT, str(root), os.path.abspath(root), *settings])  # noqa: PTH100
    file = cache_folder / f"{NAME}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"
    with _locked(file.with_suffix(".lock")) if shared else contextlib.nullcontext():
        if (cached := _load(file, key)) is not None:
            return cached
        for _ in range(2):
            since, data = time.time(), read()
            if not shared and len(data.train) + len(data.valid) < LARGE:
                return data
            states = _file_states(data.read)
            if states is not None and states[:, 3].max() < (since - SETTLING_TIME) * 1e9:
                return _save(file, key, data, states, root)
        return data


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Lock a file, if the system can, until the block or the process ends; give up after `LOCK_TIMEOUT` seconds."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(file.open("ab"))
            deadline = time.monotonic() + LOCK_TIMEOUT
            while fcntl is not None and time.monotonic() < deadline:
                with contextlib.suppress(BlockingIOError, PermissionError):
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.05)
        yield


def _file_states(paths: Sequence[str]) -> NDArray[np.int64] | None:
    """Return device, inode, mtime and ctime (in ns) of files, (N, 4); None if one does not exist."""
    try:
        stats = [os.stat(path) for path in paths]  # noqa: PTH116
    except OSError:
        return None
    largest = 2**63 - 1  # the largest int64; devices and inodes may be larger
    return np.array([(s.st_dev & largest, s.st_ino & largest, s.st_mtime_ns, s.st_ctime_ns) for s in stats], np.int64)


def _save(file: Path, key: str, data: DataFolder, states: NDArray[np.int64], root: str | Path) -> DataFolder:
    """Write a cache file, if possible, and return the list as arrays."""
    train, valid = Samples(data.train), Samples(data.valid)
    train.digest = samples_digest(train, root)
    about = {"key": key, "classes": data.classes, "notes": data.notes, "read": data.read, "digest": train.digest}
    arrays: dict[str, Any] = {
        f"{name}_{part}": array
        for name, samples in (("train", train), ("valid", valid))
        for part, array in zip(PARTS, samples.arrays, strict=True)
    }
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)  # JSON escapes bytes that are not UTF-8
    temporary = file.with_name(f"{file.name}.{os.getpid()}.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(temporary, about=text, states=states, **arrays)  # a tenth of the size for half a second
        temporary.replace(file)
    except OSError:  # the disk is full, or the folder cannot be written to: the run itself reports that
        with contextlib.suppress(OSError):
            temporary.unlink()
    return DataFolder(data.classes, train, valid, data.notes, read=data.read)


def _load(file: Path, key: str) -> DataFolder | None:
    """Return the list of a cache file; None if there is none for this key, or if something has changed since."""
    try:
        with np.load(file) as cached:
            about = json.loads(cached["about"].tobytes())
            states = _file_states(about["read"])
            if about["key"] != key or states is None or not np.array_equal(states, cached["states"]):
                return None
            train, valid = (
                Samples.from_arrays([cached[f"{name}_{part}"] for part in PARTS]) for name in ("train", "valid")
            )
            train.digest = about["digest"]
    except Exception:  # no such file, or a damaged one, which may raise anything: the folder is listed again
        return None
    return DataFolder(about["classes"], train, valid, about["notes"], read=about["read"])
