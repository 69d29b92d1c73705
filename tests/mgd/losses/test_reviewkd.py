from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mgd import Batch, Outputs
from mgd.losses.reviewkd import ReviewKD, context_loss
from tests.mgd.nets import built, has_gradient
from tests.reference import other_losses

STUDENT, TEACHER = (2, 3, 4), (3, 2, 5)


def outputs(widths: tuple[int, ...], seed: int, side: int = 8, grad: bool = False) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, c, side >> k, side >> k, generator=generator) for k, c in enumerate(widths)]
    return Outputs(torch.zeros(2, 5), [m.requires_grad_(grad) for m in maps])


def term(*widths: tuple[int, ...], **options: Any) -> ReviewKD:
    torch.manual_seed(0)
    loss = ReviewKD(STUDENT, widths or [TEACHER], **options)
    for parameter in loss.parameters():
        if parameter.ndim == 1:  # scales and shifts, which begin as ones and zeros
            torch.nn.init.normal_(parameter)
    return loss


def literal(loss: ReviewKD, student: list[np.ndarray], teacher: list[np.ndarray]) -> float:
    total, deeper = 0.0, None
    for stage in (2, 1, 0):
        values = {
            name: p.detach().double().numpy() for name, p in loss.get_submodule(f"fusions.0.{stage}").named_parameters()
        }
        fused = other_losses.conv(student[stage], values["enter.0.weight"])
        fused = other_losses.batch_norm(fused, values["enter.1.weight"], values["enter.1.bias"])
        if deeper is not None:
            fused = other_losses.attend(fused, deeper, values["attention.weight"], values["attention.bias"])
        out = other_losses.conv(fused, values["leave.0.weight"])
        out = other_losses.batch_norm(out, values["leave.1.weight"], values["leave.1.bias"])
        total += other_losses.context(out, teacher[stage])
        deeper = fused
    return total


def test_equals_the_literal_formula() -> None:
    student, teacher = outputs(STUDENT, 1), outputs(TEACHER, 2)
    loss = term(width=3)
    expected = literal(loss, [m.numpy() for m in student.features], [m.numpy() for m in teacher.features])
    assert loss(student, [teacher], Batch()).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("side", [8, 4, 2, 1])
def test_the_context_loss_equals_the_literal_formula(side: int) -> None:
    generator = torch.Generator().manual_seed(side)
    student, teacher = torch.randn(2, 2, 3, side, side, generator=generator)
    expected = other_losses.context(student.numpy(), teacher.numpy())
    assert context_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_the_context_loss_by_hand() -> None:
    board = (torch.arange(64).reshape(8, 8) % 2 * 2.0 - 1).reshape(1, 1, 8, 8)
    # Columns of 1 and -1 vanish in every pooled map: only the first of 1, 1/2, 1/4, 1/8 is left.
    assert context_loss(board, torch.zeros(1, 1, 8, 8)).item() == pytest.approx(8 / 15)
    assert context_loss(board[..., :4, :4], torch.zeros(1, 1, 4, 4)).item() == pytest.approx(4 / 7)
    assert context_loss(torch.full((1, 2, 8, 8), 3.0), torch.zeros(1, 2, 8, 8)).item() == pytest.approx(9)


def test_a_scaled_student_map_changes_nothing() -> None:
    student, teacher = outputs(STUDENT, 1), outputs(TEACHER, 2)
    scaled = Outputs(student.logits, [3 * m + 1 for m in student.features])
    loss = term()
    torch.testing.assert_close(
        loss(scaled, [teacher], Batch()), loss(student, [teacher], Batch()), rtol=1e-4, atol=1e-5
    )


def test_the_deepest_stage_learns_through_the_shallower_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = outputs(STUDENT, 1, grad=True), outputs(TEACHER, 2)
    gaps: list[torch.Tensor] = []

    def keep(*maps: torch.Tensor) -> torch.Tensor:
        gaps.append(context_loss(*maps))
        return gaps[-1]

    monkeypatch.setattr("mgd.losses.reviewkd.context_loss", keep)
    term()(student, [teacher], Batch())
    gaps[-1].backward()  # of the shallowest stage, which is compared last
    assert all(has_gradient(m) for m in student.features)


def test_stages_of_other_sizes_are_pooled_to_the_smaller_one() -> None:
    student, teacher = outputs(STUDENT, 1), outputs(TEACHER, 2, side=16)
    small = Outputs(teacher.logits, [torch.nn.functional.avg_pool2d(m, 2) for m in teacher.features])
    torch.testing.assert_close(term()(student, [teacher], Batch()), term()(student, [small], Batch()))


def test_gradient_reaches_the_student_and_the_own_layers_only() -> None:
    student, teacher = outputs(STUDENT, 1, grad=True), outputs(TEACHER, 2, grad=True)
    loss = term()
    loss(student, [teacher], Batch()).backward()
    assert all(has_gradient(m) for m in student.features) and all(m.grad is None for m in teacher.features)
    assert all(has_gradient(p) for p in loss.parameters())


def test_bf16_gives_a_float32_value_near_the_float32_one() -> None:
    student, teacher = outputs(STUDENT, 1), outputs(TEACHER, 2)
    expected = term()(student, [teacher], Batch())
    half = [Outputs(o.logits, [m.bfloat16() for m in o.features]) for o in (student, teacher)]
    with torch.autocast("cpu", torch.bfloat16):
        value = term()(half[0], half[1:], Batch())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.05, atol=0)


def test_each_teacher_has_layers_of_its_own_and_the_term_averages() -> None:
    student, teachers = outputs(STUDENT, 1), [outputs(TEACHER, 2), outputs((2, 2, 2), 3)]
    loss = term(TEACHER, (2, 2, 2), teacher_weights=[3.0, 1.0]).eval()
    parts = [loss.against(n, student, teacher, Batch()) for n, teacher in enumerate(teachers)]
    torch.testing.assert_close(loss(student, teachers, Batch()), 0.75 * parts[0] + 0.25 * parts[1])


def width_of(loss: ReviewKD) -> int:
    return len(loss.get_parameter("fusions.0.0.enter.0.weight"))


def test_the_width_follows_the_last_stage_up_to_512() -> None:
    student = Outputs(torch.zeros(1, 5), [torch.zeros(1, c, 1, 1) for c in (8, 600)])
    loss = built(ReviewKD, student, [student], 10)
    assert width_of(loss) == 512 and width_of(term()) == 4 and width_of(term(width=7)) == 7


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="the student has 3, the teachers 2"):
        term((3, 2))
    with pytest.raises(ValueError, match="one tap per stage"):
        ReviewKD([], [[]])
    with pytest.raises(ValueError, match="width"):
        term(width=0)
    with pytest.raises(TypeError):
        built(ReviewKD, outputs(STUDENT, 1), [outputs(TEACHER, 2)], 10, middle=3)


def test_context_sizes_are_those_below_the_smaller_side() -> None:
    board = torch.arange(16).reshape(1, 1, 2, 8) % 2 * 2.0 - 1  # columns of 1 and -1, which vanish in any pooled map
    assert context_loss(board, torch.zeros(1, 1, 2, 8)).item() == pytest.approx(1 / 1.5)
