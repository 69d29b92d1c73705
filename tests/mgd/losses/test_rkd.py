from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mgd import Batch, Outputs
from mgd.losses.rkd import RKD, rkd
from tests.mgd.losses.ranks import Loss, check_two_ranks
from tests.mgd.nets import built
from tests.reference import map_losses


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weights", [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0)])
def test_equals_the_literal_formula(weights: tuple[float, float]) -> None:
    student, teacher = randn(6, 3), randn(6, 5, seed=1)
    student[5] *= 20  # differences of distances above 1: the linear part
    expected = map_losses.rkd(student.numpy(), teacher.numpy(), *weights)
    value = rkd(student, teacher, distance=weights[0], angle=weights[1])
    assert value.item() == pytest.approx(expected, rel=1e-4)


def test_by_hand() -> None:
    # Three points on a line at 0, 1, 3: distances 1, 2, 3, mean 2. Equilateral: all distances 1, all cosines 1/2.
    student = torch.tensor([[0.0], [1.0], [3.0]])
    teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
    distance = 2 * (0.5 * 0.5**2 + 0 + 0.5 * 0.5**2) / 9
    # At the ends of the line the cosine is 1, in the middle -1; each angle appears twice.
    angle = 2 * (0.5 * 0.5**2 * 2 + (1.5 - 0.5)) / 27
    assert rkd(student, teacher, distance=1, angle=0).item() == pytest.approx(distance, rel=1e-5)
    assert rkd(student, teacher, distance=0, angle=1).item() == pytest.approx(angle, rel=1e-5)
    assert rkd(student, teacher).item() == pytest.approx(25 * distance + 50 * angle, rel=1e-5)


def test_motion_and_scale_change_nothing_and_similar_figures_give_zero() -> None:
    student, teacher = randn(5, 3), randn(5, 4, seed=1)
    rotation = torch.linalg.qr(randn(4, 4, seed=2))[0]
    moved = 3 * teacher @ rotation + 2
    torch.testing.assert_close(rkd(2 * student - 1, moved), rkd(student, teacher), rtol=1e-4, atol=1e-5)
    assert rkd(teacher, moved).item() == pytest.approx(0, abs=1e-8)


def test_gradient_reaches_the_student_only_also_from_bf16() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        student = randn(4, 3).to(dtype).requires_grad_()
        teacher = randn(4, 3, seed=1).to(dtype).requires_grad_()
        loss = RKD()(Outputs(student), [Outputs(teacher)], Batch())
        loss.backward()
        assert student.grad is not None and student.grad.any() and teacher.grad is None


def test_bf16_is_near_float32() -> None:
    student, teacher = randn(6, 3).bfloat16(), randn(6, 5, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = RKD()(Outputs(student), [Outputs(teacher)], Batch())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, rkd(student.float(), teacher.float()))


def test_coinciding_images_give_a_finite_gradient() -> None:
    student = randn(4, 3)
    student[1] = student[0]
    for collapsed in (student, torch.zeros(4, 3), torch.zeros(1, 3)):
        x = collapsed.clone().requires_grad_()
        loss = rkd(x, randn(len(x), 5, seed=1))
        loss.backward()
        assert loss.isfinite() and x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() < 1e3


def test_the_embedding_is_the_last_map_averaged_over_pixels_or_the_logits() -> None:
    logits, maps = [randn(4, 3), randn(4, 3, seed=1)], [randn(4, 5, 2, 2, seed=2), randn(4, 6, 3, 3, seed=3)]
    student, teacher = (Outputs(z, [randn(4, 2, 3, 3), x]) for z, x in zip(logits, maps, strict=True))
    expected = rkd(maps[0].mean((2, 3)), maps[1].mean((2, 3)))
    torch.testing.assert_close(RKD()(student, [teacher], Batch()), expected)
    torch.testing.assert_close(RKD()(Outputs(logits[0]), [teacher], Batch()), rkd(*logits))


def test_the_term_averages_over_teachers() -> None:
    student, teachers = Outputs(randn(4, 3)), [Outputs(randn(4, 5, seed=s)) for s in (1, 2)]
    each = [rkd(student.logits, t.logits, distance=1, angle=2) for t in teachers]
    term = built(RKD, student, teachers, 10, distance=1, angle=2, teacher_weights=[3.0, 1.0])
    torch.testing.assert_close(term(student, teachers, Batch()), (3 * each[0] + each[1]) / 4)


def test_wrong_use_is_refused() -> None:
    for weights in ((-1.0, 1.0), (1.0, -1.0), (0.0, 0.0), (1.0, math.nan), (math.inf, 1.0)):
        with pytest.raises(ValueError, match="one of them positive"):
            RKD(distance=weights[0], angle=weights[1])
    with pytest.raises(TypeError):
        built(RKD, Outputs(randn(4, 3)), [], 10, tau=2)
    assert RKD.weight == 1 and RKD.needs == frozenset()


def make() -> tuple[nn.Module, Loss]:
    images, teacher_logits, term = randn(8, 4), randn(8, 6, seed=1), RKD()
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(randn(3, 4, seed=2))
        layer.bias.zero_()

    def loss(module: nn.Module, part: slice) -> Tensor:
        value: Tensor = term(Outputs(module(images[part])), [Outputs(teacher_logits[part])], Batch())
        return value

    return layer, loss


def test_two_ranks_compute_the_loss_and_gradients_of_one() -> None:
    check_two_ranks(make)


def test_without_taps_of_the_teacher_rkd_compares_logits() -> None:
    logits = randn(4, 3), randn(4, 3, seed=1)
    student = Outputs(logits[0], [randn(4, 2, 3, 3)])
    torch.testing.assert_close(RKD()(student, [Outputs(logits[1])], Batch()), rkd(*logits))
