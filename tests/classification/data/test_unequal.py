"""Classes with unequal numbers of images."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from classification.data.loading import TrainBatches
from classification.data.unequal import balanced_epoch, class_weights, shuffled_epoch

LABELS = [0] * 40 + [1] * 7 + [2] * 4  # 51 images: 17 of each class in an epoch


def test_classes_are_equally_frequent_and_no_image_is_forgotten() -> None:
    labels, seen = np.array(LABELS), set[int]()
    for epoch in range(12):
        order = balanced_epoch(labels, 3, epoch)
        index = order[:, 1]
        assert Counter(labels[index].tolist()) == {0: 17, 1: 17, 2: 17}
        counts = Counter(index.tolist())
        assert max(counts[i] for i in range(40)) == 1
        assert {counts[i] for i in range(40, 47)} == {2, 3} and {counts[i] for i in range(47, 51)} == {4, 5}
        assert len({tuple(pair) for pair in order.tolist()}) == len(order)  # repetitions draw anew
        seen |= set(index.tolist())
    assert seen == set(range(51))
    assert not np.array_equal(balanced_epoch(labels, 3, 0), balanced_epoch(labels, 3, 1))
    assert not np.array_equal(balanced_epoch(labels, 3, 0), balanced_epoch(labels, 4, 0))


def test_numbers_that_do_not_divide_differ_by_one() -> None:
    found = Counter(np.array([0, 0, 0, 1, 2])[balanced_epoch(np.array([0, 0, 0, 1, 2]), 0, 0)[:, 1]].tolist())
    assert sorted(found.values()) == [1, 2, 2]


def test_every_image_once_without_it() -> None:
    order = shuffled_epoch(9, 1, 5)
    assert sorted(order[:, 1].tolist()) == list(range(9)) and set(order[:, 0].tolist()) == {5}


def test_ranks_and_a_resumed_epoch_share_one_order() -> None:
    alone = TrainBatches(51, 8, 1, labels=LABELS)
    alone.begin(2)
    whole = [pair for batch in alone for pair in batch]
    ranks = [TrainBatches(51, 8, 1, rank, 2, labels=LABELS) for rank in range(2)]
    for rank in ranks:
        rank.begin(2)
    assert [pair for batches in zip(*ranks, strict=True) for batch in batches for pair in batch] == whole
    done = sum(alone.batch_size(step) for step in range(3))
    alone.begin(2, start=3, seen=done)
    assert [pair for batch in alone for pair in batch] == whole[done:]


def test_weights_are_those_of_scikit_learn() -> None:
    utils = pytest.importorskip("sklearn.utils.class_weight")
    expected = utils.compute_class_weight("balanced", classes=np.arange(3), y=np.array(LABELS))
    assert class_weights(LABELS, 3) == pytest.approx(expected.tolist())
    assert class_weights([0, 0, 2], 3) == pytest.approx((0.75, 1.0, 1.5))
