from __future__ import annotations

import math

import pytest
import torch

from mgd import Batch, Outputs
from mgd.losses import CE, KD, LOSSES, kd
from tests.mgd.nets import has_gradient
from tests.reference import literal


@pytest.mark.parametrize("temperature", [1.0, 1.5, 4.0])
def test_equals_the_literal_formula(temperature: float) -> None:
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    expected = literal.kd(student.numpy(), teacher.numpy(), temperature)
    assert kd(student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=1e-4)


def test_by_hand() -> None:
    # p_t = (3/4, 1/4), p_s = (1/2, 1/2): KL = 3/4 log(3/2) + 1/4 log(1/2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert kd(student, teacher, temperature=1.0).item() == pytest.approx(expected)
    assert kd(2 * student, 2 * teacher, temperature=2.0).item() == pytest.approx(4 * expected)


def test_a_shift_of_the_logits_changes_nothing_and_equality_gives_zero() -> None:
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(kd(student + 5, teacher - 3), kd(student, teacher))
    assert kd(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


def test_gradient_reaches_the_student_only_also_from_bf16() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        student = torch.randn(4, 3, dtype=dtype, requires_grad=True)
        teacher = torch.randn(4, 3, dtype=dtype, requires_grad=True)
        loss = kd(student, teacher)
        loss.backward()
        assert loss.dtype == torch.float32 and has_gradient(student) and teacher.grad is None


def test_the_term_averages_over_teachers() -> None:
    student, teachers = Outputs(torch.randn(4, 3)), [Outputs(torch.randn(4, 3)) for _ in range(2)]
    expected = sum(kd(student.logits, t.logits, temperature=2.0) for t in teachers) / 2
    torch.testing.assert_close(KD(temperature=2.0)(student, teachers, Batch()), expected)


def test_label_smoothing_of_ce() -> None:
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    log_p = logits.log_softmax(1)
    expected = -(0.9 * log_p[range(4), target] + 0.1 * log_p.mean(1)).mean()
    torch.testing.assert_close(CE(label_smoothing=0.1)(Outputs(logits), [], Batch(target)), expected)


def test_registry_names_its_terms() -> None:
    assert LOSSES["kd"] is KD and LOSSES["ce"] is CE
