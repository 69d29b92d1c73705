"""The relative form at every scale of the teacher, and where there is nothing to be relative to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mgd import ChannelCost, ChannelMatching, Outputs


def drawn(channels: int, seed: int) -> Tensor:
    return torch.randn(4, channels, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_the_relative_form_does_not_know_the_scale_of_the_teacher() -> None:
    student, teacher = (Outputs(torch.zeros(5, 3), [drawn(c, c) for c in widths]) for widths in ((4, 6), (8, 15)))
    scaled = Outputs(teacher.logits, [1000 * m for m in teacher.features])
    term = ChannelMatching((4, 6), (8, 15), [None, None], form="relative", assignment="identity")
    term.observe(student, teacher)
    term.rematch()
    for stage in term.stages:
        nn.init.zeros_(stage.get_parameter("adapter.weight"))  # a student at 0
        stage.get_buffer("margin").zero_()
    assert term(student, [teacher]).item() == pytest.approx(2.0, rel=1e-5)  # 1 a stage
    assert term(student, [scaled]).item() == pytest.approx(2.0, rel=1e-5)


def relative(teacher: Tensor, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """The relative form of one stage without margin, the student's map being `gain` times a normalised one."""
    student = drawn(8, 0).requires_grad_()
    term = ChannelMatching([8], [8], [torch.zeros(8)], form="relative", assignment="identity")
    nn.init.constant_(term.get_parameter("stages.0.adapter.weight"), gain)
    term.observe([student], [teacher])
    term.rematch()
    loss = term(Outputs(torch.zeros(4, 3), [student]), [Outputs(torch.zeros(4, 3), [teacher])])
    return loss, torch.autograd.grad(loss, term.get_parameter("stages.0.adapter.weight"))[0]


def test_the_relative_form_is_bounded_where_the_teacher_is_far_below() -> None:
    teacher = drawn(8, 1)
    for far in (0 * teacher, -teacher.abs() - 1, 1e-8 * teacher, 1e-30 * teacher):
        loss, gradient = relative(far)
        assert loss.item() == pytest.approx(100, rel=1e-5)
        # The error goes with the square of the gain, so that the gradient of 100 log(error) sums to 200.
        assert gradient.sum().item() == pytest.approx(200, rel=1e-3)
    assert relative(0 * teacher, gain=0.0)[0].item() == 0


def test_the_relative_form_is_relative_at_every_scale() -> None:
    teacher = drawn(8, 1)
    loss, gradient = relative(teacher)
    assert 0.5 < loss.item() < 5
    for scale in (1e-12, 1e-8, 1e8):
        scaled, other = relative(scale * teacher, gain=scale)
        assert scaled.item() == pytest.approx(loss.item(), rel=1e-4)
        torch.testing.assert_close(scale * other, gradient, rtol=1e-3, atol=1e-4)


def test_stages_whose_teacher_is_nowhere_positive_are_named() -> None:
    term = ChannelMatching((4, 4, 4), (8, 8, 8), [None] * 3)
    student, teacher = [drawn(4, s) for s in range(3)], [drawn(8, s) for s in range(3, 6)]
    assert term.dead == []
    for sign in (-1, 1):  # a single batch with a positive value is enough
        batch = [-teacher[0].abs(), sign * teacher[1].abs(), 0 * teacher[2]]
        term.observe(student, batch)
        if sign < 0:
            term.observe(student, batch)
    term.rematch()
    assert term.dead == [0, 2]
    term.observe(student, [m.abs() for m in teacher])
    term.rematch()
    assert term.dead == []


def test_a_stage_whose_values_vanish_is_dead_too() -> None:
    term = ChannelMatching([2, 2], [3, 3], [None, None], form="relative")
    maps = torch.randn(2, 3, 4, 4)
    term.observe([torch.randn(2, 2, 4, 4)] * 2, [1e-20 * maps, 1e-9 * maps])
    term.rematch()
    assert term.dead == [0]


def test_a_stage_that_this_process_did_not_see_is_not_called_dead() -> None:
    term = ChannelMatching([2], [3], [None], form="relative")
    cost = term.stages[0].cost
    assert isinstance(cost, ChannelCost)
    cost.update(torch.randn(2, 2, 4, 4), torch.randn(2, 3, 4, 4))  # as from a checkpoint
    term.rematch()
    assert term.dead == []


def test_what_an_earlier_matching_saw_does_not_hide_a_dead_stage() -> None:
    term = ChannelMatching([2], [3], [None], form="relative")
    student, teacher = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 4, 4)
    for sign, dead in ((1, []), (-1, [0])):
        term.observe([student], [sign * teacher.abs()])
        term.rematch()
        assert term.dead == dead
