from __future__ import annotations

from typing import Any

import pytest
import torch

from mgd import Batch, Outputs
from mgd.losses.map_l2 import MapL2, map_l2
from tests.mgd.nets import built, has_gradient
from tests.reference import other_losses


def outputs(channels: int, side: int, seed: int, grad: bool = False) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(3, c, s, s, generator=generator) for c, s in ((2, 2 * side), (channels, side))]
    return Outputs(torch.zeros(3, 5), [m.requires_grad_(grad) for m in maps])


def term(*teachers: Outputs, **options: Any) -> MapL2:
    torch.manual_seed(0)
    return built(MapL2, outputs(4, 4, 0), teachers, 10, **options)


def test_equals_the_literal_formula_also_where_the_student_is_larger_or_smaller() -> None:
    student, teacher = outputs(4, 4, 1).features[-1], outputs(4, 4, 2).features[-1]
    expected = other_losses.mean_square(student.numpy(), teacher.numpy())
    assert map_l2(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    small = other_losses.pool(teacher.numpy(), 2)
    expected = other_losses.mean_square(other_losses.pool(student.numpy(), 2), small)
    assert map_l2(student, torch.from_numpy(small)).item() == pytest.approx(expected, rel=1e-5)
    assert map_l2(torch.from_numpy(small), student).item() == pytest.approx(expected, rel=1e-5)


def test_by_hand() -> None:
    assert map_l2(torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 1, 1), 1.0)).item() == 4.0


def test_a_shift_of_both_maps_changes_nothing() -> None:
    student, teacher = outputs(4, 4, 1).features[-1], outputs(4, 4, 2).features[-1]
    torch.testing.assert_close(map_l2(student + 2, teacher + 2), map_l2(student, teacher))


def test_widths_are_adapted_only_where_they_differ_and_pooling_first_changes_nothing() -> None:
    student, same, other = outputs(4, 4, 0), outputs(4, 4, 1), outputs(6, 2, 2)
    loss = term(same, other)
    assert [len(list(adapter.parameters())) for adapter in loss.adapters] == [0, 2]
    expected = map_l2(student.features[-1], same.features[-1])
    expected = (expected + map_l2(loss.adapters[1](student.features[-1]), other.features[-1])) / 2
    torch.testing.assert_close(loss(student, [same, other], Batch()), expected)


def test_gradient_reaches_the_student_and_the_adapter_only() -> None:
    student, teacher = outputs(4, 4, 0, grad=True), outputs(6, 4, 1, grad=True)
    loss = term(teacher)
    loss(student, [teacher], Batch()).backward()
    assert has_gradient(student.features[-1]) and student.features[0].grad is None
    assert teacher.features[-1].grad is None and all(has_gradient(p) for p in loss.parameters())


def test_bf16_gives_a_float32_value_near_the_float32_one() -> None:
    student, teacher = outputs(4, 4, 0), outputs(6, 4, 1)
    loss = term(teacher)
    expected = loss(student, [teacher], Batch())
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(Outputs(student.logits, [m.bfloat16() for m in student.features]), [teacher], Batch())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.02, atol=0)


def test_tokens_are_no_maps() -> None:
    student, teacher = outputs(4, 4, 0), outputs(4, 4, 1)
    tokens = teacher.features[-1].flatten(2).transpose(1, 2)
    with pytest.raises(ValueError, match=r"expected a map .*@tokens"):
        term(teacher)(student, [Outputs(teacher.logits, [tokens])], Batch())


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="has 2 taps"):
        term(outputs(4, 4, 1), tap=2)
    with pytest.raises(ValueError, match="has 0 taps"):
        term(Outputs(torch.zeros(3, 5)))
    with pytest.raises(TypeError):
        term(outputs(4, 4, 1), width=3)
