"""WKD of maps against its literal formula, by hand, and as a term."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mgd import Batch, Outputs
from mgd.losses import WKDMaps, wkd_maps
from tests.mgd.nets import built, has_gradient
from tests.reference import map_losses


def maps(seed: int, channels: int = 5, side: int = 4) -> Tensor:
    return torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", [1, 2])
@pytest.mark.parametrize("mean_weight", [1.0, 3.0])
def test_equals_the_literal_formula(grid: int, mean_weight: float) -> None:
    student, teacher = maps(0), maps(1)
    expected = map_losses.wkd_maps(student.numpy(), teacher.numpy(), mean_weight, grid)
    assert wkd_maps(student, teacher, mean_weight=mean_weight, grid=grid).item() == pytest.approx(expected, rel=1e-5)


def test_by_hand() -> None:
    # Means 1 and 2; the pixels 0 and 2 have variance 2 (of n - 1), the constant ones 0.
    student, teacher = torch.tensor([[[[0.0, 2.0]]]]), torch.tensor([[[[2.0, 2.0]]]])
    expected = 3 * 1 + (math.sqrt(2 + 1e-5) - math.sqrt(1e-5)) ** 2
    assert wkd_maps(student, teacher, mean_weight=3.0).item() == pytest.approx(expected, rel=1e-6)


def test_a_grid_that_does_not_divide_the_map_has_the_parts_of_adaptive_pooling() -> None:
    student, teacher = maps(0, side=5), torch.zeros(3, 5, 5, 5)
    # A large weight leaves the means only.
    means = torch.nn.functional.adaptive_avg_pool2d(student, 3)
    expected = means.square().sum() / (9 * 3)
    torch.testing.assert_close(
        wkd_maps(student, teacher, mean_weight=1e6, grid=3) / 1e6, expected, rtol=1e-4, atol=1e-4
    )


def test_where_the_pixels_stand_does_not_matter() -> None:
    student, teacher = maps(0), maps(1)
    moved = student.flatten(2)[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(0))].view_as(student)
    torch.testing.assert_close(wkd_maps(moved, teacher), wkd_maps(student, teacher))


def test_16_bit_maps_and_single_pixels() -> None:
    student, teacher = maps(0).bfloat16(), maps(1).bfloat16()
    found = wkd_maps(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wkd_maps(student.float(), teacher.float()))
    single = wkd_maps(maps(0, side=1), maps(1, side=1), mean_weight=1.0)
    torch.testing.assert_close(single, (maps(0, side=1) - maps(1, side=1)).square().sum() / 3)


def test_gradient_reaches_the_student_and_the_regressor_only() -> None:
    student, teacher = (Outputs(torch.zeros(3, 5), [maps(s, c).requires_grad_()]) for s, c in ((0, 4), (1, 6)))
    torch.manual_seed(0)
    term = built(WKDMaps, student, [teacher])
    term(student, [teacher], Batch()).backward()
    assert has_gradient(student.features[0]) and teacher.features[0].grad is None
    assert all(has_gradient(parameter) for parameter in term.parameters())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="mean_weight must be positive"):
        wkd_maps(maps(0), maps(1), mean_weight=0.0)
    with pytest.raises(ValueError, match="grid must be positive"):
        WKDMaps.Hyper(grid=0)
