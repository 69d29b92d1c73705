from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from classification.data.folders import read_folder
from classification.data.loading import Key, Photos, TrainBatches
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
