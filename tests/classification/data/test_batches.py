from __future__ import annotations

import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from classification.data.folders import read_folder
from classification.data.loading import Key, Photos, TrainBatches, make_loader
from classification.data.samples import Samples
from classification.data.transforms import train_transform


def keys(batches: TrainBatches, epoch: int, start: int = 0, seen: int = 0) -> list[Key]:
    batches.begin(epoch, start, seen)
    return [key for batch in batches for key in batch]


@pytest.mark.parametrize(("num", "repeats"), [(12, 3), (13, 3), (7, 2), (5, 5)])
def test_a_repeated_image_comes_several_times_in_a_row_and_an_epoch_is_as_long_as_before(
    num: int, repeats: int
) -> None:
    found = keys(TrainBatches(num, 5, seed=1, repeats=repeats), epoch=2)
    assert len(found) == num and len(set(found)) == num
    counts = Counter(index for _, index, *_ in found)
    assert len(counts) == -(-num // repeats) and sorted(counts.values())[1:] == [repeats] * (len(counts) - 1)
    order = np.random.default_rng([1, 2]).permutation(num)
    assert [(2, int(order[n // repeats]), *([n % repeats] if n % repeats else [])) for n in range(num)] == found


def test_repeats_are_the_same_on_any_number_of_ranks_and_after_a_break() -> None:
    alone = keys(TrainBatches(13, 5, seed=1, repeats=3), epoch=0)
    ranks = [TrainBatches(13, 5, 1, rank, 2, repeats=3) for rank in range(2)]
    for rank in ranks:
        rank.begin(0)
    assert [key for step in zip(*ranks, strict=True) for part in step for key in part] == alone
    assert keys(TrainBatches(13, 5, seed=1, repeats=3), epoch=0, start=1, seen=5) == alone[5:]
    assert [key[:2] for key in keys(TrainBatches(13, 5, seed=1), epoch=0)] == keys(TrainBatches(13, 5, seed=1), epoch=0)


def test_each_repetition_has_a_draw_of_its_own_and_the_first_that_of_no_repetition(photos: object) -> None:
    samples = read_folder(str(photos)).train
    images = Photos(samples, train_transform(16, "resized", randaugment=9, erasing=1.0), seed=4)
    first, again, second = images[1, 0][0], images[1, 0][0], images[1, 0, 1][0]
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(second, images[1, 0, 1][0]) and not torch.equal(second, images[2, 0, 1][0])


def test_samples_are_a_list_of_two_arrays() -> None:
    listed = [("/a/ä.jpg", 3), ("", 0), ("b\udcff.png", -1)]
    samples = Samples(listed)
    assert list(samples) == listed and len(samples) == 3 and samples[-1] == listed[2] and samples[1:] == listed[1:]
    assert all(isinstance(part, np.ndarray | str) for part in vars(samples).values())  # not one object per image
    with pytest.raises(IndexError):
        samples[3]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
def test_loading_processes_of_a_killed_rank_end_with_it(photos: object, tmp_path: Path) -> None:
    """Also where that was started by a fork server, whose children name another parent."""
    context = multiprocessing.get_context("forkserver")
    rank = context.Process(target=_load_and_wait, args=(str(photos), str(tmp_path / "workers")))
    rank.start()
    workers = _wait_for(lambda: (tmp_path / "workers").exists() and (tmp_path / "workers").read_text().split())
    assert len(workers) == 2 and all(Path("/proc", worker).exists() for worker in workers)
    rank.kill()
    rank.join()
    assert _wait_for(lambda: all(not Path("/proc", worker).exists() for worker in workers))


def _load_and_wait(photos: str, file: str) -> None:
    images = Photos(read_folder(photos).train, train_transform(16, "resized"))
    loading = iter(make_loader(images, TrainBatches(len(images), 8, 0), 2, torch.device("cpu")))
    next(loading)
    found = [str(worker.pid) for worker in loading._workers]  # type: ignore[attr-defined]
    Path(f"{file}.new").write_text(" ".join(found))
    Path(f"{file}.new").rename(file)
    time.sleep(600)


def _wait_for(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while not (found := what()) and time.monotonic() < end:
        time.sleep(0.1)
    return found
