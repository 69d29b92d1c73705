"""Depthwise convolutions that leave bfloat16 alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from classification import main_base
from classification.config import parse
from classification.engine import Engine
from classification.launch import World
from classification.precision import WideConv2d, widen_strided_depthwise
from tests.classification.conftest import SMALL


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, 3, stride=2, groups=4),
        nn.Conv2d(1, 2, 3, stride=2),
    )


def test_strided_depthwise_convolutions_alone_are_widened() -> None:
    given = network()
    other = copy.deepcopy(given)
    assert widen_strided_depthwise(other) == 1 and widen_strided_depthwise(other) == 0
    assert [type(m) is WideConv2d for m in other] == [False, True, False, False, False]
    other.load_state_dict(given.state_dict())


def test_a_wide_convolution_computes_in_float32_and_gives_its_inputs_type() -> None:
    given = network()[1]
    wide = nn.Sequential(copy.deepcopy(given))
    widen_strided_depthwise(wide)
    images = torch.randn(2, 8, 9, 9).bfloat16().requires_grad_()
    exact = images.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = wide(images)
    expected = given(exact)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.bfloat16(), rtol=0, atol=0)
    out.float().square().sum().backward()
    (out.detach().float() * 2 * expected).sum().backward()
    torch.testing.assert_close(images.grad, exact.grad.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(wide[0].weight.grad, given.weight.grad)


@pytest.mark.parametrize(("kind", "expected"), [("off", False), ("bf16", True)])
def test_a_run_on_a_processor_widens_what_it_trains(photos: Path, kind: str, expected: bool) -> None:
    words = [str(photos), "-a", "cifar_mobilenet_v2", *SMALL, "--amp", kind, "--device", "cpu"]
    args = parse(words, "", distillation=False)
    args.seeded = True
    student = Engine(main_base.prepare(args), World()).job.student
    assert student is not None and any(type(m) is WideConv2d for m in student.modules()) is expected
