"""Ranks of one machine have the decoded images once; threads play the ranks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from classification.data import cache
from classification.data.cache import Cache
from classification.data.folders import read_folder
from classification.data.images import read_image
from classification.errors import UserError

RANKS = 3


@dataclass
class Meeting:
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(RANKS, timeout=30))
    given: list[Any] = field(default_factory=lambda: [None] * RANKS)


@dataclass
class Thread:
    """One rank; `blind`: it does not see the others' memory."""

    number: int
    meeting: Meeting
    blind: bool = False

    def gather(self, value: Any) -> list[Any]:
        self.meeting.given[self.number] = value
        self.meeting.barrier.wait()
        found = list(self.meeting.given)
        self.meeting.barrier.wait()
        hidden = [Path("/dev/shm/mgd-none") if isinstance(each, Path) else each for each in found]
        return hidden if self.blind else found


def together(work: Callable[[Thread], Any], blind: tuple[int, ...] = ()) -> list[Any]:
    """Return what the work of every rank returns, or the error it raises."""
    meeting, found = Meeting(), [None] * RANKS

    def one(number: int) -> None:
        try:
            found[number] = work(Thread(number, meeting, number in blind))
        except UserError as error:
            found[number] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=one, args=(number,)) for number in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.skipif(not cache.SHARED.is_dir(), reason="no files in memory")
@pytest.mark.parametrize("blind", [(), (1,)])
def test_ranks_have_one_block_and_decode_each_image_once(blind: tuple[int, ...], photos: Path) -> None:
    samples, read = list(read_folder(photos).train), []

    def noted(path: str) -> Image.Image:
        read.append(path)
        return read_image(path)

    def work(near: Thread) -> Cache:
        return Cache(samples, noted, ranks=near)

    left = set(cache.SHARED.glob("mgd-*"))
    found = together(work, blind)
    assert sorted(read) == sorted([path for path, _ in samples] * (2 if blind else 1))
    for index, (path, _) in enumerate(samples):
        for own in found:
            assert np.array_equal(own[index].numpy(), np.asarray(read_image(path)))
    before = int(found[1][0][0, 0, 0])
    found[0][0][0, 0, 0] = before ^ 255
    assert [int(own[0][0, 0, 0]) for own in found] == [before ^ 255, before if blind else before ^ 255, before ^ 255]
    assert set(cache.SHARED.glob("mgd-*")) == left  # the memory has no name that would outlive the ranks


def test_what_is_wrong_on_one_rank_is_told_on_all(photos: Path, tmp_path: Path) -> None:
    samples = list(read_folder(photos).train)
    broken = tmp_path / "x.png"
    broken.write_bytes(b"not an image")

    def _cache(given: list[tuple[str, int]], free: int | None, near: Thread) -> Cache:
        return Cache(given, read_image, free, near)

    for given, free, says in (
        (samples, 1000, "--cache ram needs"),
        ([*samples, (str(broken), 0)], None, "x.png cannot"),
    ):
        found = together(partial(_cache, given, free))
        assert all(isinstance(error, UserError) and says in str(error) for error in found), found


@pytest.mark.skipif(not cache.SHARED.is_dir(), reason="no files in memory")
def test_shared_memory_that_is_short_is_told_on_all(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    left = set(cache.SHARED.glob("mgd-*"))
    found = together(lambda near: Cache(list(read_folder(photos).train), read_image, ranks=near))
    assert all("of shared memory, but /dev/shm has less" in str(error) for error in found), found
    assert set(cache.SHARED.glob("mgd-*")) == left
