from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mgd import Batch, Outputs
from mgd.losses.dml import DML, dml
from mgd.losses.kd import kd
from tests.reference import logit_losses as literal


def draw(seed: int = 0) -> tuple[Tensor, Tensor]:
    student, teacher = 2 * torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(seed))
    return student, teacher


def test_equals_the_literal_formula() -> None:
    student, teacher = draw()
    assert dml(student, teacher).item() == pytest.approx(literal.dml(student.numpy(), teacher.numpy()), rel=1e-4)


def test_by_hand() -> None:
    # p = (3/4, 1/4), q = (1/2, 1/2): half of (3/4 - 1/2) log(3/2) + (1/4 - 1/2) log(1/2) = log(3) / 8
    student, teacher = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert dml(student, teacher).item() == pytest.approx(math.log(3) / 8)


def test_it_is_symmetric_ignores_shifts_and_is_zero_between_equals() -> None:
    student, teacher = draw()
    torch.testing.assert_close(dml(student, teacher), dml(teacher, student))
    torch.testing.assert_close(dml(student + 5, teacher - 3), dml(student, teacher))
    assert dml(teacher, teacher).item() == 0
    both = kd(student, teacher, temperature=1.0) + kd(teacher, student, temperature=1.0)
    torch.testing.assert_close(dml(student, teacher), both / 2)


def test_far_apart_networks_keep_loss_and_gradient_finite() -> None:
    student = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    loss = dml(student, -student)
    loss.backward()
    assert loss.item() == pytest.approx(600) and student.grad is not None and student.grad.isfinite().all()


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
    dml(student, teacher, detach=False).backward()
    alone = [torch.autograd.grad(dml(a, b), a)[0] for a, b in ((student, teacher), (teacher, student))]
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
        DML.from_outputs(Outputs(student), [Outputs(teacher)], 6, temperature=2.0)


def test_several_peers_take_the_form_of_the_paper() -> None:
    torch.manual_seed(0)
    student, peers = Outputs(torch.randn(6, 5)), [Outputs(torch.randn(6, 5)) for _ in range(2)]
    one, two = (DML.from_outputs(student, peers[:n], 6) for n in (1, 2))
    torch.testing.assert_close(one(student, peers[:1], Batch()), dml(student.logits, peers[0].logits))
    expected = sum(kd(student.logits, p.logits, temperature=1.0) for p in peers) / 2
    torch.testing.assert_close(two(student, peers, Batch()), expected)


def test_two_peers_together_learn_as_from_one_symmetric_term() -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(6, 5, requires_grad=True) for _ in range(2))
    expected = torch.autograd.grad(dml(first, second, detach=False), (first, second))
    term = DML()
    both = term(Outputs(first), [Outputs(second.detach())], Batch())
    both = both + term(Outputs(second), [Outputs(first.detach())], Batch())
    for a, b in zip(torch.autograd.grad(both, (first, second)), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_form_of_dml_may_be_chosen() -> None:
    student, peer = (Outputs(torch.randn(3, 4)) for _ in range(2))
    term = DML.from_outputs(student, [peer], 6, symmetric=False)
    torch.testing.assert_close(term(student, [peer], Batch()), kd(student.logits, peer.logits, temperature=1.0))
