"""Bad inputs: each case makes one and returns the words of a run that must refuse it."""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from classification import main_base
from tests.classification.conftest import SMALL, STUDENT, TEACHER


@dataclass(frozen=True)
class Place:
    """Where a case makes what it needs, and what all cases share and none may change.

    Args:
        root: an empty folder, also the one that the run starts in.
        photos: photographs in class folders, and a teacher of them.
        teacher: its best.pth.
        run: folder of a distillation of one epoch.
        others: processes that a case started.
    """

    root: Path
    photos: Path
    teacher: Path
    run: Path
    others: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def copy(self) -> Path:
        """Copy the photographs."""
        return Path(shutil.copytree(self.photos, self.root / "photos"))

    def base(self, *more: str, data: Path | None = None, epochs: int = 1) -> list[str]:
        """The words of a short training; `more` replaces what it names."""
        words = ["-a", STUDENT, *SMALL, "--epochs", str(epochs), "--output", str(self.root / "run"), *more]
        return [str(data or self.photos), *words]

    def distil(self, *more: str, data: Path | None = None) -> list[str]:
        """The words of a short distillation."""
        teacher = ["--teacher-arch", TEACHER, "--teacher-resume", str(self.teacher)]
        return self.base(*teacher, *more, data=data)

    def go_on(self, *more: str, data: Path | None = None, **parts: Any) -> list[str]:
        """The words that resume a copy of the run, in which parts of last.pth are others; None takes one out."""
        if not (self.root / "run").exists():
            shutil.copytree(self.run, self.root / "run")
        last = self.root / "run" / "last.pth"
        if parts:
            content = torch.load(last, weights_only=True)
            for name, value in parts.items():
                part = content if name in content else content["resume"]
                part[name] = value
                if value is None:
                    del part[name]
            torch.save(content, last)
        return self.distil("--epochs", "2", "--resume", "auto", *more, data=data)

    def write(self, name: str, content: str | bytes) -> str:
        """Write a file and return its path."""
        (self.root / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return str(self.root / name)

    def save(self, name: str, content: Any) -> str:
        """Save a checkpoint and return its path."""
        torch.save(content, self.root / name)
        return str(self.root / name)


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        what: the input in words.
        words: makes it, and returns the words of a run.
        script: the main script that is given them.
        process: whether it is also run as a process of its own.
        status: the exit status.
        room: bytes that a file may have at most, as on a full disk; 0 for any number.
    """

    what: str
    words: Callable[[Place], list[str]]
    script: ModuleType = main_base
    process: bool = False
    status: int = 2
    room: int = 0


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as on a full disk; 0 for any size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size or before[0], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
