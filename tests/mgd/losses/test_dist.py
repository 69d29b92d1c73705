from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mgd import Batch, Outputs
from mgd.losses.dist import DIST, dist
from tests.mgd.losses.ranks import Loss, check_two_ranks
from tests.mgd.nets import built
from tests.reference import logit_losses as literal


def draw(seed: int = 0, images: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, images, 5, generator=generator)
    return student, teacher


def make() -> tuple[nn.Module, Loss]:
    images, teacher = draw(images=8)
    layer = nn.Linear(5, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, 25).reshape(5, 5).sin())
        layer.bias.zero_()

    def loss(module: nn.Module, part: slice) -> Tensor:
        value: Tensor = DIST()(Outputs(module(images[part])), [Outputs(teacher[part])], Batch())
        return value

    return layer, loss


@pytest.mark.parametrize(("temperature", "beta", "gamma"), [(1.0, 1.0, 1.0), (4.0, 2.0, 0.0), (2.0, 0.0, 3.0)])
def test_equals_the_literal_formula(temperature: float, beta: float, gamma: float) -> None:
    student, teacher = draw()
    expected = literal.dist(student.numpy(), teacher.numpy(), temperature, beta, gamma)
    value = dist(student, teacher, temperature=temperature, beta=beta, gamma=gamma)
    assert value.item() == pytest.approx(expected, rel=1e-4)


def test_by_hand() -> None:
    # Of two classes the rows' correlation is a sign, here + and -. p of class 0 is (3/4, 1/4) against (3/4, 4/5): the
    # columns' correlation is -1.
    student = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    teacher = torch.tensor([[3.0, 1.0], [4.0, 1.0]]).log()
    assert dist(student, teacher, beta=1.0, gamma=0.0).item() == pytest.approx(1)
    assert dist(student, teacher, beta=0.0, gamma=1.0).item() == pytest.approx(2)


def test_a_relation_kept_costs_nothing() -> None:
    student, teacher = draw()
    assert dist(teacher + 3, teacher).item() == pytest.approx(0, abs=1e-5)
    # Pearson ignores scale and shift of probabilities: half of p and half of the uniform distribution correlates fully.
    blurred = (0.5 * teacher.softmax(1) + 0.1).log()
    assert dist(blurred, teacher).item() == pytest.approx(0, abs=1e-5)
    assert dist(student, teacher).item() > 0.1


def test_what_does_not_vary_has_correlation_zero_and_no_gradient() -> None:
    teacher = draw()[1]
    student = torch.full((6, 5), 0.3, requires_grad=True)
    loss = dist(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(2)
    assert student.grad is not None and not student.grad.any()
    single = draw()[0][:1].requires_grad_()
    loss = dist(single, teacher[:1], beta=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(1) and single.grad is not None and not single.grad.any()


@pytest.mark.parametrize("shift", [25, 60, 80])
def test_classes_of_tiny_probability_count_as_any_other(shift: int) -> None:
    student, teacher = draw()
    student[:, 0], teacher[:, 0] = student[:, 0] - shift, teacher[:, 0] - shift
    expected = literal.dist(student.numpy(), teacher.numpy(), 1.0, 0.0, 1.0)
    assert dist(student, teacher, beta=0.0).item() == pytest.approx(expected, rel=1e-3)


def test_a_class_that_is_never_likely_counts_nothing() -> None:
    student, teacher = draw()
    student[:, 0] = -1000
    student.requires_grad_()
    loss = dist(student, teacher)
    loss.backward()
    assert torch.isfinite(loss) and student.grad is not None and torch.isfinite(student.grad).all()


def test_gradient_reaches_the_student_only_also_from_bf16() -> None:
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = (z.to(dtype).requires_grad_() for z in draw())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = DIST()(Outputs(student), [Outputs(teacher)], Batch())
        loss.backward()
        assert loss.dtype == torch.float32 and student.grad is not None and student.grad.any()
        assert teacher.grad is None
        values.append(loss.item())
    assert values[1] == pytest.approx(values[0], rel=0.02)


def test_the_term_averages_over_teachers() -> None:
    student, first = draw()
    teachers = [first, draw(1)[1]]
    expected = torch.stack([dist(student, t, temperature=2.0, gamma=3.0) for t in teachers]).mean()
    term = DIST(temperature=2.0, gamma=3.0)
    torch.testing.assert_close(term(Outputs(student), [Outputs(t) for t in teachers], Batch()), expected)


def test_wrong_hyper_parameters_are_refused() -> None:
    cases: tuple[dict[str, Any], ...] = ({"temperature": -1.0}, {"beta": -1.0}, {"gamma": -1.0})
    for wrong in cases:
        (name,) = wrong
        for make in (DIST, partial(dist, *draw())):
            with pytest.raises(ValueError, match=f"dist: {name} must be .*; got -1.0"):
                make(**wrong)
    student, teacher = draw()
    with pytest.raises(TypeError, match="alpha"):
        built(DIST, Outputs(student), [Outputs(teacher)], 6, alpha=1.0)


def test_two_ranks_compute_the_loss_and_gradients_of_one() -> None:
    check_two_ranks(make)


def test_what_varies_little_counts_as_anything_else() -> None:
    student = torch.randn(6, 5)
    teacher = student + 0.5 * torch.randn(6, 5)
    expected = literal.dist(student.numpy(), teacher.numpy(), 1e4, 1.0, 1.0)
    assert dist(student, teacher, temperature=1e4).item() == pytest.approx(expected, rel=1e-2)
