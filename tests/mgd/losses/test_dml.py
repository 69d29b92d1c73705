from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mgd import Batch, Outputs
from mgd.losses.dml import DML, dml
from tests.mgd.nets import built
from tests.reference import logit_losses as literal


def draw(seed: int = 0) -> tuple[Tensor, Tensor]:
    student, teacher = 2 * torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(seed))
    return student, teacher


def divergence(student: Tensor, teacher: Tensor) -> float:
    """KL of the peer's probabilities from the student's, mean over the images."""
    pairs = zip(student.numpy(), teacher.numpy(), strict=True)
    return sum(literal.kl(literal.softmax(zt), literal.softmax(zs)) for zs, zt in pairs) / len(student)


def test_equals_the_literal_formula() -> None:
    student, teacher = draw()
    assert dml(student, teacher).item() == pytest.approx(divergence(student, teacher), rel=1e-4)
    both = literal.dml(student.numpy(), teacher.numpy())
    assert dml(student, teacher, symmetric=True).item() == pytest.approx(both, rel=1e-4)


def test_by_hand() -> None:
    # p = (3/4, 1/4), q = (1/2, 1/2). KL(q || p) = 1/2 log(2/3) + 1/2 log 2 = log(4/3) / 2
    student, teacher = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert dml(student, teacher).item() == pytest.approx(math.log(4 / 3) / 2)
    # half of (3/4 - 1/2) log(3/2) + (1/4 - 1/2) log(1/2) = log(3) / 8
    assert dml(student, teacher, symmetric=True).item() == pytest.approx(math.log(3) / 8)


def test_one_form_is_symmetric_and_both_ignore_shifts_and_are_zero_between_equals() -> None:
    student, teacher = draw()
    assert not torch.isclose(dml(student, teacher), dml(teacher, student))
    torch.testing.assert_close(dml(student, teacher, symmetric=True), dml(teacher, student, symmetric=True))
    for symmetric in (False, True):
        shifted = dml(student + 5, teacher - 3, symmetric=symmetric)
        torch.testing.assert_close(shifted, dml(student, teacher, symmetric=symmetric))
        assert dml(teacher, teacher, symmetric=symmetric).item() == pytest.approx(0, abs=1e-7)
    both = dml(student, teacher) + dml(teacher, student)
    torch.testing.assert_close(dml(student, teacher, symmetric=True), both / 2)


def test_far_apart_networks_keep_loss_and_gradient_finite() -> None:
    student = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    for symmetric in (False, True):
        loss = dml(student, -student, symmetric=symmetric)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == pytest.approx(600) and gradient.isfinite().all()


def test_gradient_reaches_the_student_only_also_from_bf16() -> None:
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = (z.to(dtype).requires_grad_() for z in draw())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = DML()(Outputs(student), [Outputs(teacher)], Batch())
        loss.backward()
        assert loss.dtype == torch.float32 and student.grad is not None and student.grad.any()
        assert teacher.grad is None
        values.append(loss.item())
    assert values[1] == pytest.approx(values[0], rel=0.02)


def test_not_detached_it_gives_each_peer_what_each_would_get_alone() -> None:
    student, teacher = (z.requires_grad_() for z in draw())
    dml(student, teacher, symmetric=True, detach=False).backward()
    alone = [torch.autograd.grad(dml(a, b, symmetric=True), a)[0] for a, b in ((student, teacher), (teacher, student))]
    torch.testing.assert_close(student.grad, alone[0])
    torch.testing.assert_close(teacher.grad, alone[1])


def test_the_term_averages_over_peers() -> None:
    student, first = draw()
    peers = [first, draw(1)[1]]
    expected = torch.stack([dml(student, p) for p in peers]).mean()
    torch.testing.assert_close(DML()(Outputs(student), [Outputs(p) for p in peers], Batch()), expected)


def test_unknown_options_are_refused() -> None:
    student, teacher = draw()
    with pytest.raises(TypeError, match="temperature"):
        built(DML, Outputs(student), [Outputs(teacher)], 6, temperature=2.0)


def test_each_of_several_networks_learns_from_the_mean_over_its_peers() -> None:
    logits = [*draw(), draw(1)[0]]
    for number, own in enumerate(logits):
        peers = [Outputs(other) for position, other in enumerate(logits) if position != number]
        expected = sum(divergence(own, peer.logits) for peer in peers) / 2
        term = built(DML, Outputs(own), peers, 6)
        assert term(Outputs(own), peers, Batch()).item() == pytest.approx(expected, rel=1e-4)


def test_two_peers_together_learn_as_from_one_symmetric_term() -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(6, 5, requires_grad=True) for _ in range(2))
    expected = torch.autograd.grad(dml(first, second, symmetric=True, detach=False), (first, second))
    term = DML(symmetric=True)
    both = term(Outputs(first), [Outputs(second.detach())], Batch())
    both = both + term(Outputs(second), [Outputs(first.detach())], Batch())
    for a, b in zip(torch.autograd.grad(both, (first, second)), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("peers", [1, 2])
def test_the_form_is_the_one_that_was_chosen_whatever_the_number_of_peers(peers: int) -> None:
    student, others = draw()[0], [draw(seed)[1] for seed in range(peers)]
    outputs = [Outputs(other) for other in others]
    plain = sum(divergence(student, other) for other in others) / peers
    both = sum(literal.dml(student.numpy(), other.numpy()) for other in others) / peers
    cases: tuple[tuple[dict[str, Any], float], ...] = (
        ({}, plain),
        ({"symmetric": False}, plain),
        ({"symmetric": True}, both),
    )
    for options, expected in cases:
        term = built(DML, Outputs(student), outputs, 6, **options)
        assert term(Outputs(student), outputs, Batch()).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["dml", "udml"])
def test_the_recipes_of_paddleclas_take_its_form(name: str) -> None:
    path = Path(__file__).parents[3] / "classification" / "recipes" / f"imagenet_pplcnet_x2_5_{name}.yaml"
    assert yaml.safe_load(path.read_text())["terms"]["dml"] == {"weight": 1, "symmetric": True}
