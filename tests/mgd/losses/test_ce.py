from __future__ import annotations

import math

import pytest
import torch

from mgd import Batch, Outputs
from mgd.losses import CE


def test_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]], requires_grad=True)
    value = CE()(Outputs(logits), [], Batch(torch.tensor([1, 0])))
    assert value.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    value.backward()
    assert logits.grad is not None and logits.grad[0, 1].item() == pytest.approx((0.75 - 1) / 2)


def test_smoothing_and_mixed_labels_spread_the_mass() -> None:
    outputs, target = Outputs(torch.randn(3, 4)), torch.tensor([0, 3, 1])
    spread = 0.8 * torch.eye(4)[target] + 0.2 / 4
    smoothed, mixed = CE(label_smoothing=0.2)(outputs, [], Batch(target)), CE()(outputs, [], Batch(spread))
    torch.testing.assert_close(smoothed, mixed)


def test_class_weights_by_hand() -> None:
    """Three images at even odds of two classes: (2 log 2 + 0.5 log 2 + 0.5 log 2) / 3, not divided by the weights."""
    outputs, target = Outputs(torch.zeros(3, 2)), torch.tensor([0, 1, 1])
    term = CE(class_weights=(2.0, 0.5))
    assert term(outputs, [], Batch(target)).item() == pytest.approx(math.log(2))
    mixed = term(outputs, [], Batch(torch.tensor([[0.5, 0.5]] * 3)))
    assert mixed.item() == pytest.approx(1.25 * math.log(2))
    one = CE(class_weights=(1.0, 1.0), label_smoothing=0.1)(Outputs(torch.randn(3, 2)), [], Batch(target))
    assert torch.isfinite(one) and not term.state_dict()


def test_unit_weights_change_nothing() -> None:
    outputs, target = Outputs(torch.randn(5, 4)), torch.tensor([0, 3, 1, 1, 2])
    for values in ({}, {"label_smoothing": 0.3}):
        weighted = CE(class_weights=(1.0,) * 4, **values)(outputs, [], Batch(target))
        torch.testing.assert_close(weighted, CE(**values)(outputs, [], Batch(target)))


def test_bf16_is_computed_in_float32() -> None:
    assert CE()(Outputs(torch.randn(3, 4).bfloat16()), [], Batch(torch.tensor([0, 1, 2]))).dtype == torch.float32


def test_wrong_use_is_refused() -> None:
    for share in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            CE(label_smoothing=share)
    with pytest.raises(ValueError, match="needs labels"):
        CE()(Outputs(torch.zeros(1, 2)), [], Batch())
    for weights in ((), (0.0, 0.0), (1.0, -1.0), (math.inf, 1.0)):
        with pytest.raises(ValueError, match="class_weights must be finite numbers"):
            CE(class_weights=weights)
    with pytest.raises(ValueError, match="3 class_weights for 2 classes: give one each"):
        CE(class_weights=(1.0, 1.0, 1.0))(Outputs(torch.zeros(1, 2)), [], Batch(torch.tensor([0])))
