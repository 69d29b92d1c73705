from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mgd import Batch, Outputs
from mgd.losses.dkd import DKD, dkd
from mgd.losses.kd import kd
from tests.mgd.nets import built
from tests.reference import logit_losses as literal


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, 6, 5, generator=generator)
    return student, teacher, torch.randint(5, (6,), generator=generator)


@pytest.mark.parametrize(("temperature", "alpha", "beta"), [(1.0, 1.0, 0.5), (4.0, 1.0, 8.0), (2.0, 0.0, 1.0)])
def test_equals_the_literal_formula(temperature: float, alpha: float, beta: float) -> None:
    student, teacher, target = draw()
    expected = literal.dkd(student.numpy(), teacher.numpy(), target.numpy(), temperature, alpha, beta)
    value = dkd(student, teacher, target, temperature=temperature, alpha=alpha, beta=beta)
    assert value.item() == pytest.approx(expected, rel=1e-4)


def test_by_hand() -> None:
    # p_t = (1/2, 3/8, 1/8), p_s = (1/3, 1/3, 1/3), target 0: masses (1/2, 1/2) and (1/3, 2/3), others (3/4, 1/4) and
    # (1/2, 1/2)
    masses = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)
    others = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    student, teacher, target = torch.zeros(1, 3), torch.tensor([[4.0, 3.0, 1.0]]).log(), torch.tensor([0])
    assert dkd(student, teacher, target).item() == pytest.approx(masses + 0.5 * others)
    doubled = dkd(2 * student, 2 * teacher, target, temperature=2.0, alpha=3.0, beta=0.0)
    assert doubled.item() == pytest.approx(4 * 3 * masses)


def test_shifts_change_nothing_and_kd_is_its_sum_weighted_by_the_teachers_rest() -> None:
    student, teacher, target = draw()
    torch.testing.assert_close(dkd(student + 5, teacher - 3, target), dkd(student, teacher, target))
    assert dkd(teacher, teacher, target).item() == pytest.approx(0, abs=1e-6)
    total = torch.zeros(())
    for zs, zt, y in zip(student, teacher, target, strict=True):
        rest = 1 - zt.softmax(0)[y].item()
        total += dkd(zs[None], zt[None], y[None], alpha=1.0, beta=rest) / len(student)
    torch.testing.assert_close(total, kd(student, teacher, temperature=1.0))


def test_without_labels_the_target_is_the_teachers_class() -> None:
    student, teacher, target = draw()
    torch.testing.assert_close(dkd(student, teacher), dkd(student, teacher, teacher.argmax(1)))
    assert not torch.isclose(dkd(student, teacher), dkd(student, teacher, target))
    torch.testing.assert_close(DKD()(Outputs(student), [Outputs(teacher)], Batch()), dkd(student, teacher))
    labelled = DKD()(Outputs(student), [Outputs(teacher)], Batch(target))
    torch.testing.assert_close(labelled, dkd(student, teacher, target))


def test_confident_logits_keep_loss_and_gradient_finite() -> None:
    student = torch.tensor([[80.0, 0.0, -40.0], [0.0, 90.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 60.0, 70.0], [0.0, 200.0, 1.0]])
    loss = dkd(student, teacher, torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()


def test_gradient_reaches_the_student_only_also_from_bf16() -> None:
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher, target = draw()
        student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = DKD()(Outputs(student), [Outputs(teacher)], Batch(target))
        loss.backward()
        assert loss.dtype == torch.float32 and student.grad is not None and student.grad.any()
        assert teacher.grad is None
        values.append(loss.item())
    assert values[1] == pytest.approx(values[0], rel=0.02)


def test_the_term_averages_over_teachers() -> None:
    student, first, target = draw()
    teachers = [first, draw(1)[1]]
    first_loss, second_loss = (dkd(student, t, target, temperature=2.0, beta=1.0) for t in teachers)
    term = DKD(temperature=2.0, beta=1.0, teacher_weights=[3, 1])
    value = term(Outputs(student), [Outputs(t) for t in teachers], Batch(target))
    torch.testing.assert_close(value, 0.75 * first_loss + 0.25 * second_loss)


def test_wrong_hyper_parameters_are_refused() -> None:
    cases: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"alpha": -1.0}, {"beta": float("nan")})
    for wrong in cases:
        (name,) = wrong
        for make in (DKD, partial(dkd, *draw())):
            with pytest.raises(ValueError, match=f"dkd: {name} must be"):
                make(**wrong)
    student, teacher, _ = draw()
    with pytest.raises(TypeError, match="tau"):
        built(DKD, Outputs(student), [Outputs(teacher)], 6, tau=2.0)


def test_one_class_or_mixed_labels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dkd needs 2 classes or more; got \(2, 1\)"):
        dkd(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"a class index per image, \(2,\) int64; got a target \(2, 3\)"):
        dkd(torch.zeros(2, 3), torch.zeros(2, 3), torch.full((2, 3), 1 / 3))


def test_hyper_parameters_come_by_name_alone() -> None:
    with pytest.raises(TypeError, match="positional"):
        dkd(*draw(), 4.0)  # type: ignore[call-arg]


def test_a_deviation_over_one_class_fewer_is_another_temperature_and_weight() -> None:
    # As in the authors' code of standardised logits: (z - mean) / sqrt(sum of squares / (K - 1)).
    (student, teacher, target), number = draw(), 5

    def theirs(z: Tensor) -> Tensor:
        return (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)

    expected = 9 * dkd(theirs(student), theirs(teacher), target, temperature=2.0, alpha=1.0, beta=8.0)
    same = DKD(
        temperature=2.0 * math.sqrt(number / (number - 1)),
        alpha=9 * (number - 1) / number,
        beta=72 * (number - 1) / number,
        standardised=True,
    )
    torch.testing.assert_close(same(Outputs(student), [Outputs(teacher)], Batch(target)), expected)
