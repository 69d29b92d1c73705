"""WKD of logits against its literal formula, against POT, by hand, and as a term."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from mgd import Batch, Outputs, Probe, probe
from mgd.losses import WKDLogits, class_cost, wkd_logits
from tests.mgd.nets import toy
from tests.reference import logit_losses

TARGET = torch.tensor([0, 6, 2, 3, 3])


def logits(seed: int) -> Tensor:
    return 2 * torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))


def prototypes() -> Tensor:
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(9))


COST = class_cost(prototypes())


@pytest.mark.parametrize("sharpening", [0.5, 1.0, 3.0])
def test_the_cost_equals_the_literal_formula(sharpening: float) -> None:
    expected = torch.tensor(logit_losses.class_cost(prototypes().numpy(), sharpening))
    torch.testing.assert_close(class_cost(prototypes(), sharpening=sharpening), expected, atol=1e-5, rtol=1e-5)
    assert not class_cost(prototypes()).diagonal().any()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 2.0, "wasserstein_weight": 30.0, "epsilon": 0.05, "iterations": 10},
        {"temperature": 8.0, "wasserstein_weight": 200.0, "epsilon": 0.5, "iterations": 1},
        {"temperature": 1.0, "wasserstein_weight": 0.0, "epsilon": 0.1, "iterations": 3},
    ],
)
def test_equals_the_literal_formula(options: dict[str, Any]) -> None:
    student, teacher = logits(0), logits(1)
    expected = logit_losses.wkd_logits(
        student.double().numpy(), teacher.double().numpy(), TARGET.numpy(), COST.double().tolist(), **options
    )
    assert wkd_logits(student, teacher, TARGET, cost=COST, **options).item() == pytest.approx(expected, rel=1e-4)


def test_the_transport_agrees_with_pot() -> None:
    student, teacher = logits(0)[:1], logits(1)[:1]
    call = partial(wkd_logits, student, teacher, TARGET[:1], cost=COST, temperature=1.0, epsilon=0.2, iterations=500)
    found = call(wasserstein_weight=1.0) - call(wasserstein_weight=0.0)
    masses = [z[0, 1:].softmax(0).double().numpy() for z in (student, teacher)]
    cost = COST[1:, 1:].double().numpy()
    plan = ot.sinkhorn(masses[0] / masses[0].sum(), masses[1] / masses[1].sum(), cost, 0.2, stopThr=1e-12)
    assert found.item() == pytest.approx(float((plan * cost).sum()), abs=1e-5)


def test_by_hand() -> None:
    # Of two classes one is left beside the target: nothing is to be moved. The target's part is -1/2 log(1/2).
    found = wkd_logits(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), cost=1 - torch.eye(2))
    assert found.item() == pytest.approx(0.5 * np.log(2), rel=1e-6)
    # The student is sure of class 1, the teacher of class 2: all mass pays their cost.
    student, teacher = torch.tensor([[0.0, 200.0, 0.0]]), torch.tensor([[0.0, 0.0, 200.0]])
    cost = torch.tensor([[0.0, 0.2, 0.2], [0.2, 0.0, 0.7], [0.2, 0.7, 0.0]])
    found = wkd_logits(student, teacher, torch.tensor([0]), cost=cost, wasserstein_weight=10.0)
    assert found.item() == pytest.approx(7.0, rel=1e-5)


def test_a_permutation_of_the_classes_changes_nothing() -> None:
    student, teacher = logits(0), logits(1)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    moved = wkd_logits(student[:, order], teacher[:, order], order.argsort()[TARGET], cost=COST[order][:, order])
    torch.testing.assert_close(moved, wkd_logits(student, teacher, TARGET, cost=COST))


def test_similar_classes_cost_less() -> None:
    teacher = torch.tensor([[0.0, 0.0, 0.0, 9.0]])
    cost = class_cost(torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.1, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    near, far = torch.tensor([[0.0, 9.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 9.0, 0.0]])
    losses = [wkd_logits(student, teacher, torch.tensor([0]), cost=cost).item() for student in (near, far)]
    assert losses[0] < 0.2 * losses[1]


def test_a_class_left_out_by_minus_infinity_is_as_one_that_is_not_there() -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    more = torch.nn.functional.pad(COST, (0, 1, 0, 1), value=0.5)
    expected = wkd_logits(student, teacher, TARGET, cost=COST)
    wide = [torch.cat([z, torch.full((5, 1), -torch.inf)], dim=1) for z in (student, teacher)]
    found = wkd_logits(wide[0], wide[1], TARGET, cost=more)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, student), torch.autograd.grad(expected, student))


def test_targets_as_probabilities_or_none_are_the_likeliest_class() -> None:
    student, teacher = logits(0), logits(1)
    mixed = 0.9 * torch.nn.functional.one_hot(TARGET, 7) + 0.1 / 7
    call = partial(wkd_logits, student, teacher, cost=COST)
    torch.testing.assert_close(call(mixed), call(TARGET))
    torch.testing.assert_close(call(), call(teacher.argmax(1)))


def test_gradient_reaches_the_student_only_and_16_bit_is_computed_in_float32() -> None:
    student, teacher = logits(0).bfloat16().requires_grad_(), logits(1).bfloat16().requires_grad_()
    found = wkd_logits(student, teacher, TARGET, cost=COST)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wkd_logits(student.float(), teacher.float(), TARGET, cost=COST))
    found.backward()
    assert student.grad is not None and student.grad.any() and teacher.grad is None


def test_the_term_takes_the_last_linear_layer_of_each_teacher() -> None:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    networks = [toy(seed=seed) for seed in range(3)]
    student, *teachers = (probe(network, images) for network in networks)
    term = WKDLogits.build(student, teachers, 10)
    outputs = [Outputs(p.outputs.logits) for p in (student, *teachers)]
    target = torch.tensor([0, 2])
    expected = [
        wkd_logits(outputs[0].logits, o.logits, target, cost=class_cost(n.fc.weight))
        for o, n in zip(outputs[1:], networks[1:], strict=True)
    ]
    torch.testing.assert_close(term(outputs[0], outputs[1:], Batch(target)), (expected[0] + expected[1]) / 2)
    assert not term.state_dict()


def test_refusals() -> None:
    outputs = Outputs(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="choose another teacher or term"):
        WKDLogits.build(Probe(outputs), [Probe(outputs)], 10)
    with pytest.raises(ValueError, match="not peers that train"):
        WKDLogits.build(Probe(outputs), [Probe(outputs, frozen=False, classifier=torch.zeros(3, 4))], 10)
    with pytest.raises(ValueError, match=r"epsilon must be at least 0\.025"):
        WKDLogits.Hyper(epsilon=0.02)
    with pytest.raises(ValueError, match=r"needs a cost \(7, 7\)"):
        wkd_logits(logits(0), logits(1), TARGET, cost=torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"prototypes \(K, D\)"):
        class_cost(torch.zeros(3))
