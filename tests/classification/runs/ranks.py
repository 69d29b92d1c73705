"""Run commands as gloo ranks of this machine, forked from one process that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit status, what it printed, and its errors."""

    status: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _rank(words: list[str], folder: str, number: int, prepare: Callable[[int], None] | None) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from classification import main_mgd

    if prepare is not None:
        prepare(number)
    os._exit(main_mgd.main(words))


def run(
    words: Sequence[Sequence[str]],
    folder: Path,
    prepare: Callable[[int], None] | None = None,
    meanwhile: Callable[[list[int]], None] | None = None,
    timeout: float = 240.0,
) -> list[Ended]:
    """Run main_mgd.py as ranks that meet on a free port.

    Args:
        words: of each rank, without the flags by which ranks meet.
        folder: for what they print.
        prepare: called in each rank with its number, before the script; importable.
        meanwhile: called with their process numbers once all are started.
        timeout: seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["classification.training.distilling", "torch.distributed"])
    url = f"tcp://127.0.0.1:{free_port()}"
    folder.mkdir(exist_ok=True)
    processes = []
    for number, own in enumerate(words):
        flags = ["--world-size", str(len(words)), "--dist-url", url, "--rank", str(number)]
        processes.append(context.Process(target=_rank, args=([*own, *flags], str(folder), number, prepare)))
    for process in processes:
        process.start()
    try:
        if meanwhile is not None:
            meanwhile([process.pid or 0 for process in processes])
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.join()
    found = []
    for number, process in enumerate(processes):
        out, err = ((folder / f"{name}{number}").read_text(errors="replace") for name in ("out", "err"))
        found.append(Ended(process.exitcode if process.exitcode is not None else -1, out, err))
    return found
