from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mgd import Batch, Outputs
from mgd.losses.ssld import SSLD
from tests.mgd.nets import built
from tests.reference import logit_losses as literal


def draw(seed: int = 0) -> tuple[Tensor, Tensor]:
    student, teacher = 2 * torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(seed))
    return student, teacher


def test_equals_the_literal_formula() -> None:
    student, teacher = draw()
    value = SSLD()(Outputs(student), [Outputs(teacher)], Batch())
    assert value.item() == pytest.approx(literal.dml(student.numpy(), teacher.numpy()), rel=1e-4)


def test_by_hand() -> None:
    student, teacher = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert SSLD()(Outputs(student), [Outputs(teacher)], Batch()).item() == pytest.approx(math.log(3) / 8)


def test_labels_change_nothing() -> None:
    student, teacher = draw()
    networks = Outputs(student), [Outputs(teacher)]
    assert not SSLD.needs
    torch.testing.assert_close(SSLD()(*networks, Batch(torch.arange(6) % 5)), SSLD()(*networks, Batch()))


def test_gradient_reaches_the_student_only_also_from_bf16() -> None:
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = (z.to(dtype).requires_grad_() for z in draw())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = SSLD()(Outputs(student), [Outputs(teacher)], Batch())
        loss.backward()
        assert loss.dtype == torch.float32 and student.grad is not None and student.grad.any()
        assert teacher.grad is None
        values.append(loss.item())
    assert values[1] == pytest.approx(values[0], rel=0.02)


def test_the_term_averages_over_teachers() -> None:
    student, first = draw()
    teachers = [first, draw(1)[1]]
    alone = [SSLD()(Outputs(student), [Outputs(t)], Batch()) for t in teachers]
    value = SSLD(teacher_weights=[1, 3])(Outputs(student), [Outputs(t) for t in teachers], Batch())
    torch.testing.assert_close(value, 0.25 * alone[0] + 0.75 * alone[1])


def test_a_teacher_that_trains_is_refused_as_an_option() -> None:
    student, teacher = draw()
    with pytest.raises(TypeError, match="detach"):
        built(SSLD, Outputs(student), [Outputs(teacher)], 6, detach=False)
