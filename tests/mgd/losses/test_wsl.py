from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mgd import Batch, Outputs
from mgd.losses.wsl import WSL, wsl
from tests.mgd.nets import built
from tests.reference import logit_losses as literal


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, 6, 5, generator=generator)
    return student, teacher, torch.randint(5, (6,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_equals_the_literal_formula(temperature: float) -> None:
    student, teacher, target = draw()
    expected = literal.wsl(student.numpy(), teacher.numpy(), target.numpy(), temperature)
    assert wsl(student, teacher, target, temperature=temperature).item() == pytest.approx(expected, rel=1e-4)


def test_by_hand() -> None:
    # At tau 1 p_s = (1/4, 3/4) and p_t = (1/2, 1/2), label 0: CE_s / CE_t = 2, so the weight is 1 - exp(-2).
    student, teacher, target = torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2), torch.tensor([0])
    soft = -0.5 * math.log(0.25) - 0.5 * math.log(0.75)
    value = wsl(student, teacher, target, temperature=1.0).item()
    assert value == pytest.approx((1 - math.exp(-2)) * soft, rel=1e-5)


def test_shifts_change_nothing_and_a_student_sure_of_the_label_is_left_alone() -> None:
    student, teacher, target = draw()
    torch.testing.assert_close(wsl(student + 5, teacher - 3, target), wsl(student, teacher, target))
    sure = torch.full((6, 5), -20.0).scatter(1, target[:, None], 20.0)
    assert wsl(sure, teacher, target).item() == pytest.approx(0, abs=1e-5)


def test_the_weight_is_a_constant_to_the_gradient() -> None:
    student, teacher, target = draw()
    student.requires_grad_()
    wsl(student, teacher, target).backward()
    error_s = torch.nn.functional.cross_entropy(student, target, reduction="none")
    error_t = torch.nn.functional.cross_entropy(teacher, target, reduction="none")
    weight = 1 - (-error_s / (error_t + 1e-7)).exp()
    # d CE(p_t, p_s) / d z_s = (p_s - p_t) / tau
    expected = 4 * weight[:, None] * ((student / 2).softmax(1) - (teacher / 2).softmax(1)) / 2 / 6
    torch.testing.assert_close(student.grad, expected.detach())


def test_a_teacher_without_error_gives_finite_gradients() -> None:
    student, _, target = draw()
    student.requires_grad_()
    perfect = torch.full((6, 5), -100.0).scatter(1, target[:, None], 100.0)
    loss = wsl(student, perfect, target)
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()


def test_gradient_reaches_the_student_only_also_from_bf16() -> None:
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher, target = draw()
        student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = WSL()(Outputs(student), [Outputs(teacher)], Batch(target))
        loss.backward()
        assert loss.dtype == torch.float32 and student.grad is not None and student.grad.any()
        assert teacher.grad is None
        values.append(loss.item())
    assert values[1] == pytest.approx(values[0], rel=0.02)


def test_the_term_averages_over_teachers() -> None:
    student, first, target = draw()
    teachers = [first, draw(1)[1]]
    expected = torch.stack([wsl(student, t, target, temperature=3.0) for t in teachers]).mean()
    torch.testing.assert_close(
        WSL(temperature=3.0)(Outputs(student), [Outputs(t) for t in teachers], Batch(target)), expected
    )


def test_a_batch_without_labels_and_wrong_options_are_refused() -> None:
    student, teacher, _ = draw()
    with pytest.raises(ValueError, match="needs labels"):
        WSL()(Outputs(student), [Outputs(teacher)], Batch())
    with pytest.raises(ValueError, match="got no target"):
        wsl(student, teacher)
    with pytest.raises(ValueError, match="temperature must be positive; got 0"):
        WSL(temperature=0.0)
    with pytest.raises(TypeError, match="tau"):
        built(WSL, Outputs(student), [Outputs(teacher)], 6, tau=2.0)
