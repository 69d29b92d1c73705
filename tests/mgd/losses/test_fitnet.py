from __future__ import annotations

import pytest
import torch

from mgd import Batch, Outputs
from mgd.losses.fitnet import FitNet
from tests.mgd.nets import built
from tests.reference import map_losses


def outputs(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return Outputs(torch.randn(3, 5, generator=generator), maps)


STUDENT = ((3, 4, 4, 4), (3, 5, 4, 4), (3, 6, 2, 2))
TEACHER = ((3, 7, 4, 4), (3, 8, 2, 6), (3, 9, 2, 2))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("tap", "used"), [(None, 1), (0, 0), (-1, 2)])
def test_equals_the_literal_formula(tap: int | None, used: int) -> None:
    student, teacher = outputs(*STUDENT), outputs(*TEACHER, seed=1)
    term = built(FitNet, student, [teacher], 10, tap=tap)
    weight = term.get_parameter("regressors.0.0.weight").detach().numpy()[:, :, 0, 0]
    own, hint = (x.features[used].detach().numpy() for x in (student, teacher))
    expected = map_losses.fitnet(own, hint, weight)
    assert term(student, [teacher], Batch()).item() == pytest.approx(expected, rel=1e-4)


def test_by_hand() -> None:
    # The regressed map is 2 (1, 3) normalised to (-1, 1); against (0, 4) that is (1 + 9) / 2.
    term = FitNet([1], [[1]])
    torch.nn.init.constant_(term.get_parameter("regressors.0.0.weight"), 2.0)
    maps = [Outputs(torch.zeros(1, 2), [torch.tensor(x).view(1, 1, 1, 2)]) for x in ([1.0, 3.0], [0.0, 4.0])]
    assert term(maps[0], maps[1:], Batch()).item() == pytest.approx(5.0, rel=1e-4)


@pytest.mark.parametrize(("num_taps", "middle"), [(1, 0), (2, 1), (3, 1), (4, 2)])
def test_the_middle_tap_is_the_hint(num_taps: int, middle: int) -> None:
    assert FitNet([3] * num_taps, [[4] * num_taps]).tap == middle


def test_scale_and_shift_of_the_students_map_change_nothing() -> None:
    student, teacher = outputs(*STUDENT), outputs(*TEACHER, seed=1)
    term = built(FitNet, student, [teacher], 10)
    moved = Outputs(student.logits, [7 * x - 3 for x in student.features])
    expected = term(student, [teacher], Batch())
    torch.testing.assert_close(term(moved, [teacher], Batch()), expected, rtol=1e-4, atol=1e-5)


def test_several_teachers_have_regressors_of_their_own() -> None:
    student, teachers = outputs(*STUDENT), [outputs(*TEACHER, seed=1), outputs(*STUDENT, seed=2)]
    term = built(FitNet, student, teachers, 10, teacher_weights=[3.0, 1.0])
    each = [term.against(i, student, teacher, Batch()) for i, teacher in enumerate(teachers)]
    torch.testing.assert_close(term(student, teachers, Batch()), (3 * each[0] + each[1]) / 4)
    assert [len(r.get_parameter("0.weight")) for r in term.regressors] == [8, 5]


def test_gradient_reaches_the_student_and_the_regressor_only() -> None:
    student, teacher = outputs(*STUDENT), outputs(*TEACHER, seed=1)
    term = built(FitNet, student, [teacher], 10)
    term(student, [teacher], Batch()).backward()
    assert student.features[1].grad is not None and student.features[1].grad.any()
    assert all(x.grad is None for x in (student.features[0], *teacher.features))
    assert all(p.grad is not None and p.grad.any() for p in term.parameters())


def test_bf16_is_near_float32() -> None:
    student = outputs(*STUDENT, dtype=torch.bfloat16)
    teacher = outputs(*TEACHER, seed=1, dtype=torch.bfloat16)
    term = built(FitNet, student, [teacher], 10)
    plain = term(student, [teacher], Batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = term(student, [teacher], Batch())
    assert loss.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=2e-2, atol=0)


def test_wrong_use_is_refused() -> None:
    for tap in (3, -4):
        with pytest.raises(ValueError, match=rf"expected tap in \[-3, 3\), .* got {tap}"):
            FitNet([1, 2, 3], [[1, 2, 3]], tap=tap)
    with pytest.raises(ValueError, match="equally many taps"):
        FitNet([1, 2], [[1]])
    with pytest.raises(ValueError, match="1 teacher weights and got 2 teachers"):
        FitNet([4], [[7]])(outputs(STUDENT[0]), [outputs(TEACHER[0])] * 2, Batch())
    with pytest.raises(TypeError):
        built(FitNet, outputs(*STUDENT), [outputs(*TEACHER)], 10, layer=1)
    assert FitNet.weight == 100
