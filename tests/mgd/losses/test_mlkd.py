"""MLKD against its literal formula, its two views, and what it must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mgd import Batch, Distiller, Outputs, freeze
from mgd.losses import CE, MLKD, kd, mlkd
from tests.mgd.losses.ranks import Loss, check_two_ranks
from tests.mgd.nets import toy
from tests.reference import logit_losses


def logits(seed: int) -> Tensor:
    return 2 * torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weights", [(0.5, 0.5, 0.5), (1.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 3.0)])
@pytest.mark.parametrize("temperatures", [(1.0,), (2.0, 3.0, 4.0, 5.0, 6.0)])
def test_equals_the_literal_formula(temperatures: tuple[float, ...], weights: tuple[float, float, float]) -> None:
    student, teacher = logits(0), logits(1)
    instance, batch, classes = weights
    expected = logit_losses.mlkd(student.numpy(), teacher.numpy(), list(temperatures), *weights)
    found = mlkd(student, teacher, temperatures=temperatures, instance=instance, batch=batch, classes=classes)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_by_hand() -> None:
    # One image: the teacher has 4/5 and 1/5, the student halves. p p^T is 17/25 and 1/2; P^T P has 16/25, 4/25, 1/25
    # and 1/4 four times.
    teacher, student = torch.tensor([[math.log(4), 0.0]]), torch.zeros(1, 2)
    divergence = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    images = (17 / 25 - 1 / 2) ** 2
    classes = ((16 / 25 - 1 / 4) ** 2 + 2 * (4 / 25 - 1 / 4) ** 2 + (1 / 25 - 1 / 4) ** 2) / 2
    found = mlkd(student, teacher, temperatures=(1.0,), instance=1.0, batch=10.0, classes=100.0).item()
    assert found == pytest.approx(divergence + 10 * images + 100 * classes, rel=1e-5)


def test_the_probabilities_alone_are_kd_at_every_temperature() -> None:
    student, teacher = logits(0), logits(1)
    expected = kd(student, teacher, temperature=2.0) + kd(student, teacher, temperature=5.0)
    found = mlkd(student, teacher, temperatures=(2.0, 5.0), instance=1.0, batch=0.0, classes=0.0)
    torch.testing.assert_close(found, expected)


def test_neither_a_shift_of_an_image_nor_an_order_of_images_or_classes_changes_anything() -> None:
    student, teacher, shift = logits(0), logits(1), torch.arange(5.0)[:, None]
    expected = mlkd(student, teacher)
    torch.testing.assert_close(mlkd(student + shift, teacher - shift), expected)
    for order in ((torch.randperm(5)[:, None], torch.arange(7)), (torch.arange(5)[:, None], torch.randperm(7))):
        torch.testing.assert_close(mlkd(student[order], teacher[order]), expected)
    assert mlkd(student, student).item() == pytest.approx(0, abs=1e-6)


def test_of_16_bit_logits_and_in_autocast_it_is_computed_in_float32() -> None:
    student, teacher = logits(0).bfloat16(), logits(1).bfloat16()
    expected = mlkd(student.float(), teacher.float())
    torch.testing.assert_close(mlkd(student, teacher), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mlkd(student, teacher), expected)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        mlkd(logits(0), logits(1), temperatures=(1.0, 0.0))
    with pytest.raises(ValueError, match="temperatures must name one or more"):
        MLKD(temperatures=())
    with pytest.raises(ValueError, match="second must be"):
        MLKD(second=-1.0)
    with pytest.raises(ValueError, match="two views of each image, and this batch has one"):
        MLKD()(Outputs(logits(0)), [Outputs(logits(1))], Batch())


def two_view_transform(first: int, second: int) -> Outputs:
    return Outputs(logits(first), more=(Outputs(logits(second)),))


def test_the_second_view_adds_its_probabilities() -> None:
    student, teacher = two_view_transform(0, 1), two_view_transform(2, 3)
    each = {tau: kd(logits(1), logits(3), temperature=tau) for tau in (2.0, 3.0, 6.0)}
    again = {tau: kd(logits(0), logits(2), temperature=tau) for tau in (2.0, 6.0)}
    first = mlkd(logits(0), logits(2), temperatures=(2.0, 3.0, 6.0))
    found = MLKD(temperatures=(2.0, 3.0, 6.0), second=3.0)(student, [teacher], Batch())
    torch.testing.assert_close(found, first + 3 * (each[2.0] + each[3.0] + each[6.0]))
    found = MLKD(temperatures=(2.0, 3.0, 6.0), form="published")(student, [teacher], Batch())
    torch.testing.assert_close(found, first + again[2.0] + each[3.0] + again[6.0])
    alone = MLKD(temperatures=(2.0, 3.0, 6.0), second=0.0)
    torch.testing.assert_close(alone(student, [teacher], Batch()), first)
    assert MLKD.needed(alone.hyper) == frozenset() and MLKD.needed(MLKD.Hyper()) == {"views"}


def test_a_distiller_passes_one_view_after_another() -> None:
    images, target = torch.randn(4, 2, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    student, teacher = toy(seed=1), toy(seed=2)
    terms = {"ce": (CE(), 1.0), "all": (CE(views="all"), 1.0), "mlkd": (MLKD(), 0.9)}
    whole = Distiller(student, freeze(teacher), terms)
    found = whole.train()(images, target)
    alone = toy(seed=1).train()  # the statistics of each view's own batch, in turn
    first, second = alone(images[:, 0]), alone(images[:, 1])
    assert torch.equal(found["logits"], first)
    for name, value in alone.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name
    cross = torch.nn.functional.cross_entropy
    torch.testing.assert_close(found["ce"], cross(first, target))
    torch.testing.assert_close(found["all"], cross(first, target) + cross(second, target))
    teacher.eval()
    expected = mlkd(first, teacher(images[:, 0])) + sum(
        kd(second, teacher(images[:, 1]), temperature=tau) for tau in (2.0, 3.0, 4.0, 5.0, 6.0)
    )
    torch.testing.assert_close(found["mlkd"], expected)
    one = Distiller(toy(seed=1), freeze(toy(seed=2)), {"ce": (CE(), 1.0)}).train()(images[:, 0], target)
    assert torch.equal(one["ce"], found["ce"])


def make() -> tuple[nn.Module, Loss]:
    generator = torch.Generator().manual_seed(0)
    images, teacher = torch.randn(2, 8, 4, generator=generator), torch.randn(2, 8, 3, generator=generator)
    layer = nn.Linear(4, 3)
    nn.init.constant_(layer.bias, 0.2)
    layer.weight.data = torch.linspace(-1, 1, 12).reshape(3, 4)

    def loss(module: nn.Module, part: slice) -> Tensor:
        student = Outputs(module(images[0, part]), more=(Outputs(module(images[1, part])),))
        taught = Outputs(teacher[0, part], more=(Outputs(teacher[1, part]),))
        value: Tensor = MLKD()(student, [taught], Batch())
        return value

    return layer, loss


def test_two_ranks_compare_all_images_of_the_batch() -> None:
    check_two_ranks(make)
