"""What a flow could gain at a pair of taps, on maps whose best flow is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mgd import Outputs
from mgd.losses.preview import preview_flows


def outputs(*maps: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(maps[0]), 2), list(maps))


def drawn(seed: int, channels: int = 12, size: int = 6, num: int = 8) -> Tensor:
    return torch.randn(num, channels, size, size, generator=torch.Generator().manual_seed(seed))


def test_channels_in_another_order_cost_nothing_under_the_cheapest_flow() -> None:
    student = drawn(0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    ((found,),) = preview_flows([(outputs(student), [outputs(3 * student[:, order])])])
    assert found.cheapest == pytest.approx(0, abs=1e-5) and found.helps
    assert found.random == pytest.approx(2 - 2 / 12, abs=0.2)  # of 12 pairs one is right by chance


def test_maps_that_have_nothing_in_common_are_no_better_than_chance() -> None:
    ((found,),) = preview_flows([(outputs(drawn(0)), [outputs(drawn(1))])])
    assert not found.helps  # though the cheapest flow of one half looks cheap on that half
    assert found.cheapest == pytest.approx(2, abs=0.2) and found.random == pytest.approx(2, abs=0.1)


def test_each_teacher_and_each_pair_has_its_costs_whatever_widths_and_sizes() -> None:
    student, wide = drawn(0, 4), drawn(0, 4).repeat(1, 3, 1, 1)
    narrow, large = drawn(0, 4)[:, :2], drawn(0, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    found = preview_flows([(outputs(student, student), [outputs(wide, narrow), outputs(large, student)])])
    assert [len(pairs) for pairs in found] == [2, 2]
    for cheapest in (found[0][0], found[1][0], found[1][1]):
        assert cheapest.cheapest == pytest.approx(0, abs=1e-5)
    # Two of four student channels learn from a channel that is their own, two from another one.
    assert found[0][1].cheapest == pytest.approx(1, abs=0.2)


def test_one_image_is_too_few() -> None:
    for batches in ([], [(outputs(drawn(0, num=1)), [outputs(drawn(0, num=1))])]):
        with pytest.raises(ValueError, match="two images"):
            preview_flows(batches)
