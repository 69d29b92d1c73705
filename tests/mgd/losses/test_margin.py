from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mgd import bn_margin, partial_l2
from mgd.losses.margin import MeasuredMargin, sum_partial_l2
from tests.reference import literal


def norm(weights: list[float], biases: list[float]) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(len(weights))
    with torch.no_grad():
        bn.weight.copy_(torch.tensor(weights))
        bn.bias.copy_(torch.tensor(biases))
    return bn


def test_bn_margin_equals_the_literal_formula() -> None:
    weights = [1.0, -1.0, 0.5, 2.0, 0.1, 0.0, 0.0, 1e-8, 1.0, 1.0]
    biases = [0.0, 0.0, 0.4, -3.0, 1.0, 0.7, -0.7, 0.5, 3.08, 3.10]
    expected = [literal.bn_margin(w, b) for w, b in zip(weights, biases, strict=True)]
    np.testing.assert_allclose(bn_margin(norm(weights, biases)).numpy(), expected, rtol=1e-5)


def test_bn_margin_is_the_mean_of_the_negative_half() -> None:
    samples = 0.3 + 1.5 * torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    assert bn_margin(norm([-1.5], [0.3])).item() == pytest.approx(samples[samples < 0].mean().item(), rel=1e-2)


def test_bn_margin_without_affine_weights_and_detached() -> None:
    plain = nn.BatchNorm2d(3, affine=False)
    torch.testing.assert_close(bn_margin(plain), bn_margin(nn.BatchNorm2d(3)))
    assert not bn_margin(nn.BatchNorm2d(3)).requires_grad


def test_measured_margin() -> None:
    maps = torch.tensor([[[[-1.0, 3.0]], [[1.0, 2.0]]], [[[-2.0, -3.0]], [[0.0, 5.0]]]])  # (2, 2, 1, 2)
    measured = MeasuredMargin(2)
    for image in maps:
        measured.update(image[None])
    assert measured.mean().tolist() == [-2.0, 0.0]
    measured.reset()
    assert measured.mean().tolist() == [0.0, 0.0]
    measured.update(torch.full((1, 2, 1, 1), -(2.0**24)))
    measured.update(torch.full((1, 2, 1, 2), -1.0))  # float32 would lose them beside the first
    assert measured.total.tolist() == [-(2.0**24) - 2] * 2


def test_the_sum_over_a_large_map_is_exact() -> None:
    maps = torch.full((1, 1, 64, 64), -1.0)
    maps[0, 0, 0, 0] = -(2.0**26)
    measured = MeasuredMargin(1)
    measured.update(maps)
    assert measured.total.item() == -(2.0**26) - 4095


def test_half_floats_keep_the_scale_of_the_gradient() -> None:
    student = torch.full((1, 1, 1, 1), 1000.0, dtype=torch.float16, requires_grad=True)
    loss = partial_l2(student, torch.zeros(1, 1, 1, 1), torch.zeros(1))
    (gradient,) = torch.autograd.grad(loss * 1e-8, student)
    assert gradient.item() == pytest.approx(2e-5, rel=1e-2)


def test_partial_l2_by_hand() -> None:
    student = torch.tensor([3.0, -5.0, 0.5, -0.5, -9.0]).view(1, 1, 1, 5)
    target = torch.tensor([1.0, 2.0, -4.0, -4.0, -0.5]).view(1, 1, 1, 5)
    # target' = 1, 2, -1, -1, -0.5; the last lies below a negative target and is left alone
    expected = 2.0**2 + 7.0**2 + 1.5**2 + 0.5**2 + 0.0
    assert partial_l2(student, target, torch.tensor([-1.0])).item() == pytest.approx(expected)


@pytest.mark.parametrize("per_pixel", [False, True])
def test_partial_l2_equals_the_literal_formula(per_pixel: bool) -> None:
    torch.manual_seed(0)
    student, target, margin = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), -torch.rand(3)
    expected = literal.partial_l2(student.numpy(), target.numpy(), margin.numpy())
    given = margin[None, :, None, None].expand_as(target) if per_pixel else margin
    assert partial_l2(student, target, given).item() == pytest.approx(expected, rel=1e-5)


def test_partial_l2_gradient_reaches_the_student_only() -> None:
    student, target = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4, requires_grad=True)
    margin = torch.randn(3, requires_grad=True)
    partial_l2(student, target, margin).backward()
    assert student.grad is not None and target.grad is None and margin.grad is None
    wanted = torch.maximum(target, margin[:, None, None])
    ignored = (student <= wanted) & (wanted <= 0)
    assert ignored.any() and not student.grad[ignored].any()
    torch.testing.assert_close(student.grad[~ignored], (2 * (student - wanted))[~ignored].detach())


def test_partial_l2_in_bf16_is_summed_in_float32() -> None:
    student, target = torch.randn(2, 3, 32, 32).bfloat16(), torch.randn(2, 3, 32, 32).bfloat16()
    loss = partial_l2(student, target, torch.zeros(3))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(partial_l2(student.float(), target.float(), torch.zeros(3)).item())


def test_partial_l2_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="one shape"):
        partial_l2(torch.randn(1, 2, 3, 3), torch.randn(1, 3, 3, 3), torch.zeros(2))


def test_slices_of_a_batch_sum_to_the_whole() -> None:
    student, teacher, margin = torch.randn(5, 3, 4, 4, requires_grad=True), torch.randn(5, 6, 4, 4), -torch.rand(3)
    sizes = []

    def reduce(part: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(part))
        return part[:, ::2], margin

    whole = partial_l2(student, teacher[:, ::2], margin)
    parts, energy = sum_partial_l2(student, teacher, reduce, slice_size=2 * 3 * 4 * 4, with_energy=True)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student) for loss in (parts, whole)))
    expected = float(np.square(np.maximum(teacher[:, ::2].numpy(), 0)).sum())
    assert energy.item() == pytest.approx(expected, rel=1e-5) and not energy.requires_grad
    assert sum_partial_l2(student, teacher, reduce, slice_size=2 * 3 * 4 * 4)[1].item() == 0


def test_the_compiled_sum_and_its_gradient_are_those_of_the_plain_one() -> None:
    student, teacher, margin = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), -torch.rand(3)
    inputs = [tensor.requires_grad_() for tensor in (student, teacher, margin)]

    def loss(student: Tensor, teacher: Tensor, margin: Tensor) -> tuple[Tensor, Tensor]:
        return sum_partial_l2(student, teacher, lambda part: (part, margin), slice_size=2 * 3 * 4 * 4, with_energy=True)

    torch._dynamo.reset()
    found = [call(*inputs) for call in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True))]
    torch.testing.assert_close(*found)
    gradients = [torch.autograd.grad(error, inputs, allow_unused=True) for error, _ in found]
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    assert all(gradient[1] is None and gradient[2] is None for gradient in gradients)
    assert not any(energy.requires_grad for _, energy in found)


def test_a_margin_may_differ_by_pixel() -> None:
    student, target = torch.full((1, 1, 1, 2), 1.0), torch.full((1, 1, 1, 2), -9.0)
    margin = torch.tensor([-1.0, -3.0]).view(1, 1, 1, 2)
    assert partial_l2(student, target, margin).item() == 2.0**2 + 4.0**2


def test_the_gradient_scales_with_the_loss() -> None:
    student = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = partial_l2(student, torch.randn(2, 3, 4, 4), -torch.rand(3))
    once, thrice = (torch.autograd.grad(factor * loss, student, retain_graph=True)[0] for factor in (1, 3))
    torch.testing.assert_close(thrice, 3 * once)


def test_zeros_are_no_negative_values() -> None:
    measured = MeasuredMargin(1)
    measured.update(torch.tensor([-2.0, 0.0, 0.0, 3.0]).view(1, 1, 1, 4))
    assert measured.mean().tolist() == [-2.0]


def test_the_measured_margin_keeps_no_graph_of_the_teacher() -> None:
    measured = MeasuredMargin(2)
    measured.update(torch.randn(1, 2, 3, 3, requires_grad=True))
    assert not measured.total.requires_grad and not measured.mean().requires_grad


@pytest.mark.parametrize("outside", [False, True])
def test_targets_are_made_in_float32_whatever_autocast_says(outside: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, c, 4, 4, generator=generator) for c in (3, 6))
    mix, margin = torch.rand(3, 6, generator=generator), torch.zeros(3)
    expected = literal.partial_l2(student.numpy(), np.einsum("st,bthw->bshw", mix, teacher), margin.numpy())
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        found, _ = sum_partial_l2(student, teacher, lambda part: (torch.einsum("st,bthw->bshw", mix, part), margin))
    assert found.item() == pytest.approx(expected, rel=1e-5)
