"""Layers that leave bfloat16 alone where a processor is slow at it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from classification import main_base, main_mgd
from classification.config import parse
from classification.engine import Engine
from classification.launch import World
from classification.precision import WideConv2d, WideLinear, widen
from mgd import Distiller
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
    assert widen(other, everything=False) == 1 and widen(other, everything=False) == 0
    assert [type(m) is WideConv2d for m in other] == [False, True, False, False, False]
    other.load_state_dict(given.state_dict())


def test_everything_is_every_convolution_and_linear_layer() -> None:
    given = nn.Sequential(*network(), nn.Linear(3, 4), nn.BatchNorm2d(3), nn.Conv1d(2, 2, 1))
    assert widen(given, everything=True) == 6 and widen(given, everything=True) == 0
    assert [type(m) in (WideConv2d, WideLinear) for m in given] == [True] * 6 + [False] * 2


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), (2, 8, 9, 9)),
        (nn.Conv2d(8, 4, 3), (2, 8, 9, 9)),
        (nn.Linear(8, 4), (2, 5, 8)),
    ],
)
def test_a_wide_layer_computes_in_float32_and_gives_its_inputs_type(layer: nn.Module, shape: tuple[int, ...]) -> None:
    wide = nn.Sequential(copy.deepcopy(layer))
    assert widen(wide, everything=True) == 1
    inputs = torch.randn(shape).bfloat16().requires_grad_()
    exact = inputs.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = wide(inputs)
    expected = layer(exact)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.bfloat16(), rtol=0, atol=0)
    out.float().square().sum().backward()
    (out.detach().float() * 2 * expected).sum().backward()
    torch.testing.assert_close(inputs.grad, exact.grad.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(wide[0].weight.grad, layer.weight.grad)


@pytest.mark.parametrize(
    ("kind", "hardware", "expected"), [("off", False, "none"), ("bf16", True, "strided"), ("bf16", False, "all")]
)
def test_a_run_on_a_processor_widens_what_it_trains(
    photos: Path, monkeypatch: pytest.MonkeyPatch, kind: str, hardware: bool, expected: str
) -> None:
    monkeypatch.setattr("classification.engine.has_bfloat16", lambda device: hardware)
    words = [str(photos), "-a", "cifar_mobilenet_v2", *SMALL, "--amp", kind, "--device", "cpu"]
    args = parse(words, "", distillation=False)
    args.seeded = True
    student = Engine(main_base.prepare(args), World()).job.student
    assert student is not None
    layers = [m for m in student.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    wide = [m for m in layers if type(m) in (WideConv2d, WideLinear)]
    assert {0: "none", len(layers): "all"}.get(len(wide), "strided") == expected
    assert all(max(m.stride) > 1 for m in wide) or expected == "all"


def test_layers_of_a_term_are_widened_and_the_teacher_is_left_alone(
    distil: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("classification.engine.has_bfloat16", lambda device: False)
    words = [*distil[: distil.index("--loss-factor")], "--distiller", "ofd", "--amp", "bf16", "--device", "cpu"]
    args = parse(words, "", distillation=True)
    args.seeded = True
    distiller = Engine(main_mgd.prepare(args), World()).job.distiller
    assert isinstance(distiller, Distiller)
    for trained in (distiller.student, distiller.terms["ofd"]):
        layers = [type(m) for m in trained.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert layers and {*layers} <= {WideConv2d, WideLinear}
    assert not any(type(m) in (WideConv2d, WideLinear) for m in distiller.teachers[0].modules())
