from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mgd import reduce_channels, solve_flow
from mgd.losses.reduce import REDUCERS
from tests.reference import literal

INDEX = torch.tensor([[0, 2, 1], [4, 3, 6], [5, -1, -1]])  # T = 7, S = 3, two empty slots
MEMBERS = [[0, 4, 5], [2, 3], [1, 6]]
WEIGHTS = torch.tensor([[0.5, 0, 0, 0, 0.3, 0.2, 0], [0, 0, 0.9, 0.1, 0, 0, 0], [0.0, 1, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize("reducer", ["amp", "sp", "sp_mean"])
def test_equals_the_literal_formula(reducer: str) -> None:
    torch.manual_seed(0)
    teacher, margin = torch.randn(2, 7, 3, 4), torch.randn(7)
    target, reduced = reduce_channels(teacher, margin, INDEX, reducer)
    assert target.shape == (2, 3, 3, 4) and reduced.shape == (3,)
    for b, s, y, x in np.ndindex(*target.shape):
        values = [teacher[b, t, y, x].item() for t in MEMBERS[s]]
        assert target[b, s, y, x].item() == pytest.approx(literal.reduce_pixel(values, reducer), rel=1e-5)
    for s, members in enumerate(MEMBERS):
        own = margin[members]
        assert reduced[s].item() == pytest.approx((own.max() if reducer == "sp" else own.mean()).item(), rel=1e-5)


def test_by_hand() -> None:
    teacher = torch.tensor([1.0, -3.0, 2.0]).view(1, 3, 1, 1)
    index, margin = torch.tensor([[0], [1], [2]]), torch.tensor([-1.0, -2.0, -6.0])
    got = {r: reduce_channels(teacher, margin, index, r) for r in ("amp", "sp", "sp_mean")}
    expected = {"amp": (-3.0, -3.0), "sp": (2.0, -1.0), "sp_mean": (0.0, -3.0)}
    for reducer, (target, reduced) in got.items():
        assert (target.item(), reduced.item()) == pytest.approx(expected[reducer], abs=1e-6)


def test_sm_copies_the_single_member() -> None:
    teacher, margin = torch.randn(2, 7, 3, 3), torch.randn(7)
    flow = solve_flow(torch.rand(3, 7), capacity="single")
    target, reduced = reduce_channels(teacher, margin, flow, "sm")
    assert torch.equal(target, teacher[:, flow.index[0]]) and torch.equal(reduced, margin[flow.index[0]])


def test_rd_draws_members_with_their_margins_and_reaches_all() -> None:
    teacher = torch.arange(7.0).view(1, 7, 1, 1).expand(3, 7, 20, 20)
    target, margin = reduce_channels(teacher, -torch.arange(7.0), INDEX, "rd", torch.Generator().manual_seed(0))
    assert margin.shape == target.shape == (3, 3, 20, 20)
    assert torch.equal(margin, -target)
    for s, members in enumerate(MEMBERS):
        counts = torch.bincount(target[:, s].long().flatten(), minlength=7)
        assert set(counts.nonzero().flatten().tolist()) == set(members)
        expected = 1200 / len(members)
        assert (counts[members] - expected).abs().max() < 5 * expected**0.5


def test_rd_is_reproducible_from_its_generator() -> None:
    teacher, margin = torch.randn(2, 7, 5, 5), torch.randn(7)
    draws = [reduce_channels(teacher, margin, INDEX, "rd", torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("reducer", REDUCERS)
def test_with_as_many_channels_all_reducers_are_a_permutation(reducer: str) -> None:
    teacher, margin = torch.randn(2, 5, 3, 3), torch.randn(5)
    order = torch.randperm(5)
    weights = torch.eye(5)[order] if reducer == "linear" else None
    target, reduced = reduce_channels(teacher, margin, order[None], reducer, weights=weights)
    torch.testing.assert_close(target, teacher[:, order])
    torch.testing.assert_close(reduced.amax((0, 2, 3)) if reducer == "rd" else reduced, margin[order])


@pytest.mark.parametrize("reducer", ["amp", "sp", "sp_mean"])
def test_order_of_members_does_not_matter(reducer: str) -> None:
    teacher, margin = torch.randn(2, 6, 3, 3), torch.randn(6)
    index = torch.tensor([[0, 1], [2, 3], [4, 5]])
    for got, expected in zip(
        reduce_channels(teacher, margin, index.flip(0), reducer),
        reduce_channels(teacher, margin, index, reducer),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reducer", ["amp", "sp", "sp_mean", "rd"])
def test_bf16_maps_stay_bf16(reducer: str) -> None:
    target, _ = reduce_channels(torch.randn(2, 7, 3, 3).bfloat16(), torch.randn(7), INDEX, reducer)
    assert target.dtype == torch.bfloat16


def test_no_margin_stays_no_margin_beside_empty_slots() -> None:
    for reducer in ("amp", "sp", "sp_mean"):
        _, margin = reduce_channels(torch.randn(1, 7, 2, 2), torch.full((7,), -torch.inf), INDEX, reducer)
        assert (margin == -torch.inf).all()


@pytest.mark.parametrize("reducer", REDUCERS)
def test_the_layout_of_the_maps_changes_nothing_and_is_kept(reducer: str) -> None:
    index = INDEX[:1] if reducer == "sm" else INDEX
    teacher, margin = torch.randn(2, 7, 3, 4), torch.randn(7)
    last = teacher.contiguous(memory_format=torch.channels_last)
    weights = WEIGHTS if reducer == "linear" else None
    found = [
        reduce_channels(t, margin, index, reducer, torch.Generator().manual_seed(0), weights=weights)
        for t in (teacher, last)
    ]
    torch.testing.assert_close(found[1], found[0])
    if reducer != "rd":
        assert found[1][0].is_contiguous(memory_format=torch.channels_last)


def test_rd_stays_within_the_members_where_a_draw_rounds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 1 - 2**-24))
    index = torch.arange(2**5)[:, None]
    teacher = torch.arange(2.0**5).view(1, -1, 1, 1)
    target, _ = reduce_channels(teacher, torch.zeros(2**5), index, "rd")
    assert target.item() == 2**5 - 1


def test_bad_input_is_refused() -> None:
    teacher, margin = torch.randn(1, 7, 2, 2), torch.zeros(7)
    with pytest.raises(ValueError, match="amp, sp"):
        reduce_channels(teacher, margin, INDEX, "max")
    with pytest.raises(ValueError, match="up to 2: use capacity 'single'"):
        reduce_channels(teacher, margin, INDEX[:2], "sm")
    with pytest.raises(ValueError, match="empty column"):
        reduce_channels(teacher, margin, torch.tensor([[0, -1]]), "amp")


def test_of_two_opposite_values_amp_takes_the_positive() -> None:
    teacher = torch.tensor([-2.0, 2.0]).view(1, 2, 1, 1)
    for index in (torch.tensor([[0], [1]]), torch.tensor([[1], [0]])):
        assert reduce_channels(teacher, torch.zeros(2), index, "amp")[0].item() == 2


def test_linear_is_the_weighted_sum_of_maps_and_of_margins() -> None:
    teacher, margin = torch.randn(2, 7, 3, 4), torch.randn(7)
    target, reduced = reduce_channels(teacher, margin, INDEX, "linear", weights=WEIGHTS)
    for s, row in enumerate(WEIGHTS.tolist()):
        expected = sum(weight * teacher[:, t] for t, weight in enumerate(row))
        torch.testing.assert_close(target[:, s], expected)
        assert reduced[s].item() == pytest.approx(
            sum(w * m for w, m in zip(row, margin.tolist(), strict=True)), abs=1e-6
        )
    flow = replace(solve_flow(torch.rand(3, 7)), weights=WEIGHTS.double().numpy())
    torch.testing.assert_close(reduce_channels(teacher, margin, flow, "linear")[0], target)
    half, _ = reduce_channels(teacher.bfloat16(), margin, INDEX, "linear", weights=WEIGHTS)
    assert half.dtype == torch.bfloat16
    _, endless = reduce_channels(teacher, torch.full((7,), -torch.inf), INDEX, "linear", weights=WEIGHTS)
    assert (endless == -torch.inf).all()


def test_linear_needs_one_row_of_weights_per_student_channel() -> None:
    teacher, margin = torch.randn(1, 7, 2, 2), torch.zeros(7)
    with pytest.raises(ValueError, match=r"needs weights \(3, 7\), one row per student channel; got none"):
        reduce_channels(teacher, margin, INDEX, "linear")
    with pytest.raises(ValueError, match=r"got weights \(7, 3\)"):
        reduce_channels(teacher, margin, INDEX, "linear", weights=WEIGHTS.T)
