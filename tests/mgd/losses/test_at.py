from __future__ import annotations

import math

import pytest
import torch

from mgd import Batch, Outputs
from mgd.losses.at import AT, at
from tests.mgd.nets import built
from tests.reference import map_losses


def outputs(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return Outputs(torch.randn(shapes[0][0], 5, generator=generator) if shapes else torch.zeros(2, 5), maps)


@pytest.mark.parametrize("teacher_shape", [(3, 6, 4, 4), (3, 2, 7, 6), (3, 5, 2, 9)])
def test_equals_the_literal_formula(teacher_shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(3, 4, 4, 4, generator=generator), torch.randn(teacher_shape, generator=generator)
    expected = map_losses.at(student.numpy(), teacher.numpy())
    assert at(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_by_hand() -> None:
    # Q_s = (9, 16), so (9, 16) / sqrt(337); Q_t = ((1 + 1) / 2, 0), so (1, 0)
    student = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
    teacher = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).view(1, 2, 1, 2)
    root = math.sqrt(337)
    assert at(student, teacher).item() == pytest.approx(((9 / root - 1) ** 2 + (16 / root) ** 2) / 2)


def test_scale_sign_and_order_of_the_channels_change_nothing() -> None:
    student, teacher = outputs((3, 4, 4, 4), (3, 6, 4, 4)).features
    expected = at(student, teacher)
    torch.testing.assert_close(at(-3 * student.flip(1), 0.2 * teacher), expected)
    assert at(teacher, 2 * teacher).item() == pytest.approx(0, abs=1e-12)
    assert at(student.flip(2), teacher).item() != pytest.approx(expected.item(), rel=1e-3)


def test_taps_are_summed_and_teachers_averaged() -> None:
    student = outputs((3, 4, 8, 8), (3, 8, 4, 4))
    teachers = [outputs((3, 5, 8, 8), (3, 9, 2, 2), seed=1), outputs((3, 2, 4, 4), (3, 3, 4, 4), seed=2)]
    each = [sum(at(s, t) for s, t in zip(student.features, x.features, strict=True)) for x in teachers]
    torch.testing.assert_close(AT()(student, teachers, Batch()), (each[0] + each[1]) / 2)
    term = built(AT, student, teachers, 10, teacher_weights=[1.0, 3.0])
    torch.testing.assert_close(term(student, teachers, Batch()), (each[0] + 3 * each[1]) / 4)


def test_gradient_reaches_the_student_only() -> None:
    student, teacher = outputs((3, 4, 4, 4)), outputs((3, 6, 2, 2), seed=1)
    AT()(student, [teacher], Batch()).backward()
    assert student.features[0].grad is not None and student.features[0].grad.any()
    assert teacher.features[0].grad is None


def test_bf16_is_near_float32_and_a_zero_map_is_finite() -> None:
    student, teacher = outputs((3, 4, 4, 4), dtype=torch.bfloat16), outputs((3, 6, 2, 2), seed=1, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = AT()(student, [teacher], Batch())
    expected = at(student.features[0].float(), teacher.features[0].float())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    zero = torch.zeros(1, 2, 3, 3, requires_grad=True)
    at(zero, torch.ones(1, 2, 3, 3)).backward()
    assert zero.grad is not None and zero.grad.isfinite().all()


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="2 of the student, 1 of the teacher"):
        AT()(outputs((3, 4, 4, 4), (3, 8, 2, 2)), [outputs((3, 4, 4, 4))], Batch())
    with pytest.raises(ValueError, match="tap both networks"):
        AT()(outputs(), [outputs()], Batch())
    with pytest.raises(TypeError):
        built(AT, outputs((3, 4, 4, 4)), [outputs((3, 4, 4, 4))], 10, power=2)
    assert AT.weight == 1000
