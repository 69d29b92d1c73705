from __future__ import annotations

import pytest
import torch

from mgd import Batch, Outputs
from mgd.losses.afd import AFD, TapAttention, afd
from tests.mgd.nets import built
from tests.reference import map_losses

STUDENT = ((5, 4, 6, 6), (5, 5, 3, 3))
TEACHER = ((5, 6, 4, 5), (5, 7, 3, 3), (5, 8, 2, 2))  # another number of taps, larger and smaller maps


def outputs(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return Outputs(torch.randn(5, 3, generator=generator), maps)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_equals_the_literal_formula() -> None:
    student, teacher = outputs(*STUDENT), outputs(*TEACHER, seed=1)
    arrays = [[x.detach().numpy() for x in net.features] for net in (student, teacher)]
    term = built(AFD, student, [teacher], 10, width=8)
    layers = {name: value.numpy() for name, value in term.attentions[0].state_dict().items()}
    expected = map_losses.tap_attention(arrays[0], arrays[1], layers)
    attention = term.attentions[0](student.features, teacher.features)
    torch.testing.assert_close(attention.detach(), torch.as_tensor(expected).float(), rtol=1e-3, atol=1e-5)
    value = map_losses.afd(arrays[0], arrays[1], expected)
    assert term(student, [teacher], Batch()).item() == pytest.approx(value, rel=1e-4)


def test_by_hand() -> None:
    # Unit energies: teacher (1, 0); students (0, 1), (1, 0) and (0.6, 0.8); mean squares 1, 0 and (0.16 + 0.64) / 2.
    rows = ([1.0, 0.0], [0.0, 3.0], [-2.0, 0.0], [3**0.5, 2.0])
    teacher, *student = (torch.tensor(row).view(1, 1, 1, 2) for row in rows)
    attention = torch.tensor([[[0.5, 0.25, 0.25]]])
    assert afd(student, [teacher], attention).item() == pytest.approx(0.5 * 1 + 0.25 * 0.4)


def test_weights_sum_to_one_over_the_student_taps_and_follow_their_order() -> None:
    student, teacher = outputs(*STUDENT).features, outputs(*TEACHER, seed=1).features
    layer = TapAttention([4, 5], [6, 7, 8], 8)
    attention = layer(student, teacher)
    assert attention.shape == (5, 3, 2)
    torch.testing.assert_close(attention.sum(2), torch.ones(5, 3))
    assert (attention[:, :, 0] - 0.5).abs().max() > 0.01
    layer.keys = layer.keys[::-1]
    layer.student_position.data = layer.student_position.data.flip(0)
    torch.testing.assert_close(layer(student[::-1], teacher), attention.flip(2))


def test_scale_and_order_of_the_channels_change_no_distance() -> None:
    student, teacher = outputs(*STUDENT).features, outputs(*TEACHER, seed=1).features
    attention = torch.full((5, 3, 2), 0.5)
    expected = afd(student, teacher, attention)
    moved = afd([-2 * x.flip(1) for x in student], [0.1 * x for x in teacher], attention)
    torch.testing.assert_close(moved, expected)
    assert afd(teacher[:1], [3 * teacher[0]], torch.ones(5, 1, 1)).item() == pytest.approx(0, abs=1e-12)


def test_several_teachers_have_attentions_of_their_own() -> None:
    student, teachers = outputs(*STUDENT), [outputs(*TEACHER, seed=1), outputs(*STUDENT, seed=2)]
    term = built(AFD, student, teachers, 10, teacher_weights=[3.0, 1.0])
    each = [term.against(i, student, teacher, Batch()) for i, teacher in enumerate(teachers)]
    torch.testing.assert_close(term(student, teachers, Batch()), (3 * each[0] + each[1]) / 4)


def test_gradient_reaches_the_student_and_the_attention_only() -> None:
    student, teacher = outputs(*STUDENT), outputs(*TEACHER, seed=1)
    term = built(AFD, student, [teacher], 10, width=8)
    term(student, [teacher], Batch()).backward()
    assert all(x.grad is not None and x.grad.any() for x in student.features)
    assert all(x.grad is None for x in teacher.features)
    for name, parameter in term.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-7 or name.endswith("bilinear.1.bias")  # the softmax does not see it


def test_bf16_is_near_float32() -> None:
    student = outputs(*STUDENT, dtype=torch.bfloat16)
    teacher = outputs(*TEACHER, seed=1, dtype=torch.bfloat16)
    term = built(AFD, student, [teacher], 10)
    wide = [Outputs(x.logits, [f.detach().float() for f in x.features]) for x in (student, teacher)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = term(student, [teacher], Batch())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, term(wide[0], wide[1:], Batch()))


def test_tokens_are_no_maps() -> None:
    student, teacher = outputs(*STUDENT), outputs(*TEACHER, seed=1)
    tokens = Outputs(student.logits, [x.flatten(2).transpose(1, 2) for x in student.features])
    with pytest.raises(ValueError, match=r"expected a map .*@tokens"):
        built(AFD, tokens, [teacher], 10, width=8)


def test_wrong_use_is_refused() -> None:
    for arguments in (([], [[1]]), ([1], []), ([1], [[1], []])):
        with pytest.raises(ValueError, match="at least one tap of every network"):
            AFD(*arguments)
    with pytest.raises(ValueError, match="width must be at least 1; got 0"):
        AFD([1], [[1]], width=0)
    with pytest.raises(TypeError):
        built(AFD, outputs(*STUDENT), [outputs(*TEACHER)], 10, heads=2)
    assert AFD.weight == 50 and AFD([1], [[1]]).attentions[0].student_position.shape == (1, 128)
