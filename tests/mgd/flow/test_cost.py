from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mgd import ChannelCost, channel_cost
from mgd.flow import make_cost
from tests.reference import literal


@pytest.mark.parametrize("shape", [(1, 2, 3, 1, 1), (3, 4, 6, 2, 5)])
def test_equals_the_literal_formula(shape: tuple[int, ...]) -> None:
    b, s, t, h, w = shape
    torch.manual_seed(0)
    student, teacher = torch.randn(b, s, h, w), torch.randn(b, t, h, w)
    expected = literal.channel_cost(student.numpy(), teacher.numpy())
    np.testing.assert_allclose(channel_cost(student, teacher).numpy(), expected, atol=1e-5)


def test_by_hand() -> None:
    student = torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]]]])  # one map along x, one dead
    teacher = torch.tensor([[[[2.0, 0.0]], [[-3.0, 0.0]], [[0.0, 5.0]]]])
    torch.testing.assert_close(channel_cost(student, teacher), torch.tensor([[0.0, 4.0, 2.0], [2.0, 2.0, 2.0]]))


def test_scale_of_a_map_does_not_matter() -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(channel_cost(student * 7e-15, teacher * 1e9), channel_cost(student, teacher))


def test_running_mean_weighs_batches_by_images() -> None:
    student, teacher = torch.randn(7, 3, 4, 4), torch.randn(7, 5, 4, 4)
    running = ChannelCost(3, 5)
    for part in (slice(0, 2), slice(2, 7)):
        running.update(student[part], teacher[part])
    torch.testing.assert_close(running.mean(), channel_cost(student, teacher).double(), atol=1e-5, rtol=1e-5)
    restored = ChannelCost(3, 5)
    restored.load_state_dict(running.state_dict())
    assert torch.equal(restored.mean(), running.mean())
    running.reset()
    with pytest.raises(RuntimeError, match="no images were observed"):
        running.mean()


def test_the_error_of_bf16_maps_averages_out() -> None:
    costs = ChannelCost(3, 5), ChannelCost(3, 5)
    for _ in range(200):
        student = torch.randn(4, 3, 8, 8).bfloat16()
        teacher = (torch.randn(4, 5, 8, 8) + student[:, :1].float()).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            costs[0].update(student, teacher)
        costs[1].update(student.float(), teacher.float())
        one = channel_cost(student, teacher)
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, channel_cost(student.float(), teacher.float()), rtol=0, atol=8e-3)
    torch.testing.assert_close(costs[0].mean(), costs[1].mean(), rtol=0, atol=5e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_agree(layout: torch.memory_format) -> None:
    student, teacher = torch.randn(3, 4, 5, 6), torch.randn(3, 7, 5, 6)
    moved = (student.to(memory_format=layout), teacher.to(memory_format=layout))
    expected = 2 - 2 * F.cosine_similarity(student.flatten(2)[:, :, None], teacher.flatten(2)[:, None], dim=3).mean(0)
    torch.testing.assert_close(channel_cost(*moved), expected)


def test_mismatched_maps_are_refused() -> None:
    with pytest.raises(ValueError, match="resolution"):
        channel_cost(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2))
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        channel_cost(torch.randn(2, 3), torch.randn(2, 3))
    with pytest.raises(ValueError, match="channels"):
        ChannelCost(3, 5).update(torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4))


def test_autocast_changes_no_cost_of_float32_maps() -> None:
    student, teacher = torch.randn(4, 3, 8, 8), torch.randn(4, 5, 8, 8)
    expected = channel_cost(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(channel_cost(student, teacher), expected)
    mixed = channel_cost(student.bfloat16(), teacher)  # of two types: multiplied in float32
    torch.testing.assert_close(mixed, channel_cost(student.bfloat16().float(), teacher), rtol=0, atol=1e-6)


def test_another_number_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="the same images"):
        channel_cost(torch.randn(2, 3, 4, 4), torch.randn(3, 3, 4, 4))


def test_maps_of_16_bits_are_multiplied_in_float32_where_bfloat16_would_be_emulated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3, 5, 5).bfloat16(), torch.randn(4, 6, 5, 5).bfloat16()
    exact = torch.cosine_similarity(
        student.double()[:, :, None].flatten(3), teacher.double()[:, None].flatten(3), dim=3
    )
    for hardware in (True, False):
        monkeypatch.setattr("mgd.flow.cost.has_bfloat16", lambda device, found=hardware: found)
        wrong = float((channel_cost(student, teacher) - (2 - 2 * exact.mean(0))).abs().max())
        assert wrong > 1e-5 if hardware else wrong < 1e-6


@pytest.mark.parametrize("scale", [1e-15, 1e-20, 3e-23, 1e-38])
def test_no_scale_takes_a_cost_out_of_its_range(scale: float) -> None:
    maps = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    cost = channel_cost(scale * maps, maps)
    assert (cost >= -1e-6).all() and (cost <= 4 + 1e-6).all()
    if scale < 1e-18:  # squares of float32 end at 1e-45: too short to have a direction
        assert (cost == 2).all()
    else:
        torch.testing.assert_close(cost, channel_cost(maps, maps), rtol=0, atol=1e-5)


def test_the_mean_keeps_no_graph_of_the_networks() -> None:
    running = ChannelCost(3, 5)
    running.update(torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4, requires_grad=True))
    assert not running.cosine.requires_grad and not running.mean().requires_grad


def literal_correlation(student: Tensor, teacher: Tensor) -> np.ndarray:
    """2 - 2 corr over images and pixels, pair by pair."""
    rows = [x.double().transpose(0, 1).flatten(1).numpy() for x in (student, teacher)]
    return np.array([[2 - 2 * np.corrcoef(a, b)[0, 1] for b in rows[1]] for a in rows[0]])


def test_the_correlation_is_that_over_images_and_pixels() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 3, 4, 5), torch.randn(6, 4, 4, 5) * 3 + 20
    teacher[:, 0] += 5 * student[:, 1]
    expected = literal_correlation(student, teacher)
    np.testing.assert_allclose(channel_cost(student, teacher, "correlation"), expected, atol=1e-5)
    total = make_cost(3, 4, "correlation")
    for part in (slice(0, 2), slice(2, 3), slice(3, 6)):
        total.update(student[part], teacher[part])
    np.testing.assert_allclose(total.mean(), expected, atol=1e-5)
    assert expected[1, 0] == expected.min() and total.shape == (3, 4)
    total.reset()
    with pytest.raises(RuntimeError, match="no images"):
        total.mean()


def test_the_correlation_knows_which_images_a_channel_responds_to() -> None:
    shape = torch.rand(1, 1, 4, 4)
    often, seldom = torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1), torch.tensor([4.0, 3, 2, 1]).view(4, 1, 1, 1)
    student, teacher = shape * often, torch.cat([shape * often, shape * seldom], dim=1)
    assert channel_cost(student, teacher)[0].tolist() == pytest.approx([0, 0], abs=1e-5)  # the same pictures
    cost = channel_cost(student, teacher, "correlation")[0]
    assert cost[0].item() == pytest.approx(0, abs=1e-5) and cost[1] > 0.5


def test_a_constant_channel_correlates_with_none() -> None:
    student = torch.randn(5, 2, 3, 3)
    student[:, 0] = 7.3
    assert channel_cost(student, student, "correlation").tolist() == [[2, 2], [2, pytest.approx(0, abs=1e-5)]]
    broken = torch.full((5, 2, 3, 3), torch.nan)
    assert channel_cost(student, broken, "correlation").isnan().all()


def test_an_unknown_cost_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown cost 'euclid'; choose from cosine, correlation"):
        channel_cost(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), "euclid")
    with pytest.raises(ValueError, match=r"expected \(2, 3\) channels, got \(1, 1\)"):
        make_cost(2, 3, "correlation").update(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
