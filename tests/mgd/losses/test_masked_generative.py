from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mgd import Batch, Outputs
from mgd.losses.masked_generative import MaskedGenerative, draw_mask
from tests.mgd.nets import built, has_gradient
from tests.reference import other_losses


def outputs(channels: int, side: int, seed: int, grad: bool = False) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    return Outputs(torch.zeros(2, 5), [torch.randn(2, channels, side, side, generator=generator).requires_grad_(grad)])


def term(student: Outputs, *teachers: Outputs, **options: Any) -> MaskedGenerative:
    torch.manual_seed(0)
    return built(MaskedGenerative, student, teachers, 10, **options)


def literal(loss: MaskedGenerative, number: int, student: np.ndarray, teacher: np.ndarray, mask: np.ndarray) -> float:
    layers: Any = loss.restorers[number]
    first, _, second = ([p.detach().numpy() for p in layer.parameters()] for layer in layers.generator)
    align = [p.detach().numpy() for p in layers.align.parameters()]
    aligned = other_losses.conv(student, *align) if align else student
    hidden = other_losses.conv(aligned * mask, *first)
    return other_losses.mean_square(other_losses.conv(np.maximum(hidden, 0), *second), teacher)


@pytest.mark.parametrize("mask", ["channels", "pixels"])
@pytest.mark.parametrize("width", [3, 4])
def test_equals_the_literal_formula(mask: str, width: int) -> None:
    student, teacher = outputs(3, 4, 1), outputs(width, 4, 2)
    loss = term(student, teacher, ratio=0.4, mask=mask)
    loss.generator = torch.Generator().manual_seed(5)
    drawn = draw_mask(teacher.features[0], 0.4, mask, torch.Generator().manual_seed(5)).numpy()
    assert 0 < drawn.mean() < 1
    expected = literal(loss, 0, student.features[0].numpy(), teacher.features[0].numpy(), drawn)
    assert loss(student, [teacher], Batch()).item() == pytest.approx(expected, rel=1e-4)


def test_by_hand_with_a_generator_that_copies() -> None:
    student, teacher = outputs(3, 2, 0), outputs(3, 2, 0)
    loss = term(student, teacher, ratio=0.0)
    restorer: Any = loss.restorers[0]
    for layer in (restorer.generator[0], restorer.generator[2]):
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.bias)
    maps = Outputs(student.logits, [torch.tensor([2.0, -5.0, 1.0]).reshape(1, 3, 1, 1).expand(2, 3, 2, 2)])
    wanted = Outputs(student.logits, [torch.tensor([1.0, 0.0, 3.0]).reshape(1, 3, 1, 1).expand(2, 3, 2, 2)])
    # The ReLU makes (2, 0, 1) of it: squares 1, 0, 4.
    assert loss(maps, [wanted], Batch()).item() == pytest.approx(5 / 3)


def test_a_mask_hides_whole_channels_or_whole_pixels_at_the_ratio_asked_for() -> None:
    maps = torch.zeros(40, 25, 6, 6)
    generator = torch.Generator().manual_seed(0)
    for what, shape in (("channels", (40, 25, 1, 1)), ("pixels", (40, 1, 6, 6))):
        mask = draw_mask(maps, 0.15, what, generator)
        assert mask.shape == shape and set(mask.unique().tolist()) == {0.0, 1.0}
        assert (1 - mask).mean().item() == pytest.approx(0.15, abs=0.03)


def test_evaluation_masks_nothing_and_training_draws_anew() -> None:
    student, teacher = outputs(8, 4, 1), outputs(8, 4, 2)
    loss = term(student, teacher, ratio=0.5)
    first, second = loss(student, [teacher], Batch()), loss(student, [teacher], Batch())
    assert first != second
    loss.eval()
    ones = np.ones((2, 8, 1, 1))
    expected = literal(loss, 0, student.features[0].numpy(), teacher.features[0].numpy(), ones)
    assert loss(student, [teacher], Batch()).item() == pytest.approx(expected, rel=1e-4)


def test_the_order_of_the_images_changes_nothing() -> None:
    student, teacher = outputs(3, 4, 1), outputs(4, 4, 2)
    loss = term(student, teacher).eval()
    turned = [Outputs(o.logits, [o.features[0].flip(0)]) for o in (student, teacher)]
    torch.testing.assert_close(loss(turned[0], turned[1:], Batch()), loss(student, [teacher], Batch()))


def test_larger_maps_are_pooled_before_the_mask() -> None:
    student, teacher = outputs(3, 8, 1), outputs(4, 4, 2)
    loss = term(student, teacher).eval()
    small = other_losses.pool(student.features[0].numpy(), 4)
    expected = literal(loss, 0, small, teacher.features[0].numpy(), np.ones((2, 4, 1, 1)))
    assert loss(student, [teacher], Batch()).item() == pytest.approx(expected, rel=1e-4)


def test_gradient_reaches_the_student_and_the_own_layers_only() -> None:
    student, teacher = outputs(3, 4, 1, grad=True), outputs(4, 4, 2, grad=True)
    loss = term(student, teacher)
    loss(student, [teacher], Batch()).backward()
    assert has_gradient(student.features[0]) and teacher.features[0].grad is None
    assert all(has_gradient(p) for p in loss.parameters())


def test_bf16_gives_a_float32_value_near_the_float32_one() -> None:
    student, teacher = outputs(3, 4, 1), outputs(4, 4, 2)
    loss = term(student, teacher).eval()
    expected = loss(student, [teacher], Batch())
    half = [Outputs(o.logits, [o.features[0].bfloat16()]) for o in (student, teacher)]
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(half[0], half[1:], Batch())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.02, atol=0)


def test_each_teacher_has_layers_of_its_own_and_the_term_averages() -> None:
    student, teachers = outputs(3, 4, 1), [outputs(3, 4, 2), outputs(5, 4, 3)]
    loss = term(student, *teachers, teacher_weights=[3.0, 1.0]).eval()
    parts = [loss.against(n, student, teacher, Batch()) for n, teacher in enumerate(teachers)]
    torch.testing.assert_close(loss(student, teachers, Batch()), 0.75 * parts[0] + 0.25 * parts[1])


def test_wrong_use_is_refused() -> None:
    student = outputs(3, 4, 1)
    for options, message in (({"ratio": 1.0}, "ratio"), ({"mask": "rows"}, "channels, pixels"), ({"tap": 1}, "1 taps")):
        with pytest.raises(ValueError, match=message):
            term(student, student, **options)
    with pytest.raises(TypeError):
        term(student, student, alpha=1.0)


def test_the_share_that_is_masked_by_default() -> None:
    assert MaskedGenerative(3, [3]).hyper.ratio == 0.15
