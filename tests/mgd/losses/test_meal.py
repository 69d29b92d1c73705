from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mgd import Batch, Outputs
from mgd.losses.meal import MEAL, meal
from mgd.losses.term import standardise
from tests.mgd.nets import built
from tests.reference import logit_losses as literal


def draw(classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    student, first, second = 2 * torch.randn(3, 6, classes, generator=torch.Generator().manual_seed(0))
    return student, first, second


def build(classes: int = 5, **options: Any) -> MEAL:
    torch.manual_seed(0)
    return MEAL(classes, **options)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 1.0]])
def test_similarity_equals_the_literal_formula(weights: list[float]) -> None:
    student, *teachers = draw()
    expected = literal.meal(student.numpy(), [t.numpy() for t in teachers], weights)
    assert meal(student, teachers, teacher_weights=weights).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("classes", [5, 130])
def test_discriminator_equals_the_literal_formula(classes: int) -> None:
    student, first, second = draw(classes)
    term = build(classes, similarity=0.0, discriminator=2.0)
    linear = [layer for layer in term.discriminator if isinstance(layer, nn.Linear)]
    layers = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linear]
    expected = 2 * literal.discriminator(student.numpy(), ((first + second) / 2).numpy(), layers)
    value = term(Outputs(student), [Outputs(first), Outputs(second)], Batch())
    assert value.item() == pytest.approx(expected, rel=1e-4)


def test_by_hand() -> None:
    # The mean of (3/4, 1/4) and (1/4, 3/4) is (1/2, 1/2), though neither teacher is.
    first = torch.tensor([[math.log(3.0), 0.0]])
    student = torch.tensor([[math.log(3.0), 0.0]])
    soft = -0.5 * math.log(0.75) - 0.5 * math.log(0.25)
    assert meal(student, [first, -first]).item() == pytest.approx(soft)
    # A discriminator of zeros knows nothing: log 2 for each answer.
    term = build(2)
    for parameter in term.parameters():
        nn.init.zeros_(parameter)
    value = term(Outputs(student), [Outputs(first), Outputs(-first)], Batch())
    assert value.item() == pytest.approx(soft + math.log(2))


def test_the_order_of_teachers_and_a_shift_of_logits_change_nothing_in_the_similarity() -> None:
    student, first, second = draw()
    torch.testing.assert_close(meal(student, [first, second]), meal(student + 1, [second - 2, first + 3]))
    torch.testing.assert_close(meal(student, first), meal(student, [first, first]))


def test_widths_are_those_of_the_source_and_never_below_two() -> None:
    for classes, widths in ((1000, [1000, 125, 15, 2]), (10, [10, 2, 2, 2])):
        term = built(MEAL, Outputs(torch.zeros(1, classes)), [], 6, similarity=0.5)
        linear = [layer for layer in term.discriminator if isinstance(layer, nn.Linear)]
        assert [linear[0].in_features, *(layer.out_features for layer in linear)] == widths
        assert (term.hyper.similarity, term.hyper.discriminator) == (0.5, 1.0)


def test_joint_descent_teaches_the_discriminator_and_moves_the_student_the_same_way() -> None:
    student, first, second = draw()
    student.requires_grad_()
    term = build(similarity=0.0)
    networks = Outputs(student), [Outputs(first), Outputs(second)]
    before = term(*networks, Batch())
    before.backward()
    assert all(p.grad is not None and p.grad.any() for p in term.parameters())
    assert student.grad is not None
    # A step of either alone, down its gradient, lowers the same cross-entropy: nothing is reversed.
    moved = Outputs((student - 0.5 * student.grad).detach())
    assert term(moved, networks[1], Batch()) < before
    torch.optim.SGD(term.parameters(), 0.1).step()
    assert term(*networks, Batch()) < before


def test_gradient_reaches_the_student_only_also_from_bf16() -> None:
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        student, first, second = (z.to(dtype).requires_grad_() for z in draw(40))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = build(40)(Outputs(student), [Outputs(first), Outputs(second)], Batch())
        loss.backward()
        assert loss.dtype == torch.float32 and student.grad is not None and student.grad.any()
        assert first.grad is None and second.grad is None
        values.append(loss.item())
    assert values[1] == pytest.approx(values[0], rel=0.02)


def test_one_teacher_and_standardised_logits() -> None:
    student, first, _ = draw()
    plain, standard = build(), build(standardised=True)
    scaled = Outputs(standardise(student)), [Outputs(standardise(first))]
    value = standard(Outputs(student), [Outputs(first)], Batch())
    torch.testing.assert_close(value, plain(*scaled, Batch()))


def test_wrong_use_is_refused() -> None:
    student, first, second = draw()
    cases: tuple[dict[str, Any], ...] = ({"similarity": -1.0}, {"discriminator": -1.0})
    for wrong in cases:
        with pytest.raises(ValueError, match="must be at least 0"):
            MEAL(5, **wrong)
    with pytest.raises(ValueError, match="num_classes must be at least 2; got 1"):
        MEAL(1)
    with pytest.raises(ValueError, match="got 2 weights and 1 teachers"):
        MEAL(5, teacher_weights=[1, 2])(Outputs(student), [Outputs(first)], Batch())
    with pytest.raises(ValueError, match="0 teachers"):
        MEAL(5)(Outputs(student), [], Batch())
    with pytest.raises(TypeError, match="temperature"):
        built(MEAL, Outputs(student), [Outputs(first), Outputs(second)], 6, temperature=2.0)


def test_meal_weighs_its_teachers_in_both_parts() -> None:
    torch.manual_seed(0)
    student, teachers = Outputs(torch.randn(6, 5)), [Outputs(torch.randn(6, 5)) for _ in range(2)]
    term = MEAL(5, teacher_weights=[3, 1])
    similarity = meal(student.logits, [t.logits for t in teachers], teacher_weights=[3, 1])
    answers = term._discriminate(student.logits, (3 * teachers[0].logits + teachers[1].logits) / 4)
    torch.testing.assert_close(term(student, teachers, Batch()), similarity + answers)
