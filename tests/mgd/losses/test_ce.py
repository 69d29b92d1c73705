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


def test_bf16_is_computed_in_float32() -> None:
    assert CE()(Outputs(torch.randn(3, 4).bfloat16()), [], Batch(torch.tensor([0, 1, 2]))).dtype == torch.float32


def test_wrong_use_is_refused() -> None:
    for share in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            CE(label_smoothing=share)
    with pytest.raises(ValueError, match="needs labels"):
        CE()(Outputs(torch.zeros(1, 2)), [], Batch())
