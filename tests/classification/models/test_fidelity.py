from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from torch import Tensor

from classification.models.fidelity import Fidelity, compare, table


def found(right: tuple[int, int, int, int], difference: float = 0.0) -> Fidelity:
    return Fidelity(sum(right), True, right, sum(right), difference, 10.0)


def test_compare_by_hand() -> None:
    before = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    after = torch.tensor([[2.0, 0.5], [0.0, 1.0], [3.0, 2.0], [0.0, 2.0]])
    target = torch.tensor([0, 0, 0, 0])  # both right, the first alone, the second alone, neither
    batches = [(torch.tensor(part), target[part]) for part in ([0, 1, 2], [3])]
    result = compare(lambda index: before[index], lambda index: after[index], batches)
    assert result == Fidelity(4, True, (1, 1, 1, 1), 2, 3.0, 2.0) and result.top1() == (50, 50)


def test_images_of_unknown_classes_have_no_top1() -> None:
    def logits(images: Tensor) -> Tensor:
        return images

    result = compare(logits, logits, [(torch.eye(3), torch.full((3,), -1))])
    assert not result.labelled and result.agree == 3
    assert not any("top-1" in line for line in table(result, (1, 1), {}))


def test_the_interval_is_that_of_a_paired_bootstrap() -> None:
    right = (80, 12, 4, 4)
    gains = np.repeat([0.0, -100.0, 100.0, 0.0], right)
    theirs = bootstrap((gains,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert found(right).interval() == pytest.approx(tuple(theirs), abs=0.6)


@pytest.mark.parametrize(
    ("right", "tolerance", "fault"),
    [
        ((900, 50, 0, 50), 0.5, "top-1 changes by -5.00 points"),
        ((900, 50, 0, 50), 7.0, None),
        ((90, 1, 0, 9), 0.5, None),  # one image of 100: the interval reaches 0
        ((900, 0, 50, 50), 0.0, None),  # better
    ],
)
def test_only_a_fall_beyond_doubt_is_a_fault(
    right: tuple[int, int, int, int], tolerance: float, fault: str | None
) -> None:
    said = found(right).fault(tolerance, exact=False)
    assert said is None if fault is None else said is not None and said.startswith(fault)


def test_other_logits_are_a_fault_where_they_should_be_the_same() -> None:
    assert found((9, 0, 0, 1), difference=0.5).fault(0.5, exact=False) is None
    assert "differ by up to 0.5" in str(found((9, 0, 0, 1), difference=0.5).fault(0.5, exact=True))
    assert "not finite" in str(found((9, 0, 0, 1), difference=float("nan")).fault(0.5, exact=False))


def test_logits_that_are_not_finite_are_seen_in_any_batch() -> None:
    broken = [torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, float("nan")]]), torch.tensor([[0.0, 1.0]])]
    batches = [(torch.tensor(number), torch.tensor([1])) for number in range(3)]
    result = compare(lambda _: torch.tensor([[0.0, 1.0]]), lambda number: broken[int(number)], batches)
    assert "not finite" in str(result.fault(0.5, exact=False))
