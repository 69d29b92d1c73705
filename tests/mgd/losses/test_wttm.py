"""WTTM against its literal formula, and what it must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mgd.losses import kd, wttm
from tests.reference import logit_losses


def logits(seed: int) -> Tensor:
    return 2 * torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("exponent", [0.1, 0.2, 1.0, 1.5])
def test_equals_the_literal_formula(exponent: float) -> None:
    student, teacher = logits(0), logits(1)
    expected = logit_losses.wttm(student.numpy(), teacher.numpy(), exponent)
    assert wttm(student, teacher, exponent=exponent).item() == pytest.approx(expected, rel=1e-5)


def test_by_hand() -> None:
    # The teacher has 4/5 and 1/5: their roots are in the ratio 2 : 1 and sum to 3 / sqrt(5). The student has halves.
    teacher, student = torch.tensor([[math.log(4), 0.0]]), torch.zeros(1, 2)
    divergence = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    found = wttm(student, teacher, exponent=0.5).item()
    assert found == pytest.approx(3 / math.sqrt(5) * divergence, rel=1e-6)


def test_without_a_power_it_is_kd_without_a_temperature() -> None:
    student, teacher = logits(0), logits(1)
    torch.testing.assert_close(wttm(student, teacher, exponent=1.0), kd(student, teacher, temperature=1.0))


def test_a_shift_of_an_image_changes_nothing() -> None:
    student, teacher, shift = logits(0), logits(1), torch.arange(5.0)[:, None]
    torch.testing.assert_close(wttm(student + shift, teacher - shift), wttm(student, teacher))


def test_of_16_bit_logits_it_is_computed_in_float32() -> None:
    student, teacher = logits(0).bfloat16(), logits(1).bfloat16()
    found = wttm(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wttm(student.float(), teacher.float()))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="exponent must be positive"):
        wttm(logits(0), logits(1), exponent=0.0)
