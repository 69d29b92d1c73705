"""Layers that leave bfloat16 alone where a processor is slow at it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from classification.models import build
from classification.options.config import parse
from classification.runs.world import Seed, World
from classification.training import alone, distilling
from classification.training.engine import Engine
from classification.training.precision import MixedPrecision, WideConv2d, widen
from mgd import has_bfloat16
from tests.classification.conftest import SMALL
from tests.classification.test_main import options

CPU = torch.device("cpu")


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
    assert widen(other) == 1 and widen(other) == 0
    assert [type(m) is WideConv2d for m in other] == [False, True, False, False, False]
    other.load_state_dict(given.state_dict())


@pytest.mark.skipif(not has_bfloat16(CPU), reason="maps are float32 on a processor without bfloat16")
def test_a_wide_layer_computes_in_float32_and_gives_its_inputs_type() -> None:
    layer = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, padding_mode="reflect")
    wide = nn.Sequential(copy.deepcopy(layer))
    assert widen(wide) == 1
    inputs = torch.randn(2, 8, 9, 9).bfloat16().requires_grad_()
    exact = inputs.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = wide(inputs)
    expected = layer(exact)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.bfloat16(), rtol=0, atol=0)
    out.float().square().sum().backward()
    (out.detach().float() * 2 * expected).sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(inputs.grad, exact.grad.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(wide[0].weight.grad, layer.weight.grad)


def test_a_layer_that_two_modules_share_stays_one() -> None:
    layer = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
    one, other = nn.Sequential(layer), nn.Sequential(layer)
    shared = nn.ModuleDict({"one": one, "other": other}).eval()
    weight, names = layer.weight, list(shared.state_dict())
    assert widen(shared) == 1 and one[0] is other[0] and not one[0].training
    assert one[0].weight is weight and list(shared.state_dict()) == names


class Attention(nn.Module):
    """One of each operation that autocast turns to 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.line = nn.Conv2d(3, 8, 4, 4), nn.Conv1d(8, 8, 1)
        self.up, self.heads, self.head = nn.ConvTranspose2d(8, 8, 2), nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.line(self.up(self.embed(images)).flatten(2)).transpose(1, 2)
        tokens = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        tokens = torch.einsum("bnc,bmc->bnm", tokens, tokens) @ tokens
        out: torch.Tensor = self.head(self.heads(tokens, tokens, tokens)[0].mean(1))
        return out


@pytest.mark.parametrize("hardware", [True, False])
def test_nothing_is_computed_in_bfloat16_where_the_device_lacks_it(
    hardware: bool,
) -> None:
    found: set[torch.dtype] = set()

    class Noted(TorchDispatchMode):
        def __init__(self) -> None:
            TorchDispatchMode.__init__(self)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            found.update(x.dtype for x in pytree.tree_leaves((args, out)) if isinstance(x, torch.Tensor))
            return out

    with Noted():
        MixedPrecision(Attention(), CPU, "bf16", hardware)(torch.randn(2, 3, 8, 8)).float().sum().backward()
    assert (torch.bfloat16 in found) == hardware and torch.float32 in found


@pytest.mark.parametrize(("kind", "expected"), [("off", False), ("bf16", True)])
def test_a_run_on_a_processor_widens_what_it_trains_and_not_its_teacher(
    distil: list[str], kind: str, expected: bool, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher.pth"
    torch.save(build("cifar_mobilenet_v2", 3).state_dict(), teacher)
    both = {"a": "cifar_mobilenet_v2", "teacher_arch": "cifar_mobilenet_v2", "teacher_resume": str(teacher)}
    words = options(distil[: distil.index("--loss-factor")], **both, distiller="kd", amp=kind, device="cpu")
    job = distilling.prepare(parse(words, "", distillation=True), Seed(0, True))
    assert job.student is not None
    assert any(isinstance(m, WideConv2d) for m in job.student.modules()) == expected
    assert not any(isinstance(m, WideConv2d) for m in job.teachers[0].modules())


def test_a_teacher_is_float32_on_a_processor_without_bfloat16(
    distil: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    job = distilling.prepare(parse(options(distil, device="cpu"), "", distillation=True), Seed(0, True))
    assert job.teacher_dtype == "float32"


def test_a_run_says_that_it_computes_in_float32(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("classification.training.precision.has_bfloat16", lambda device: False)
    words = [str(photos), "-a", "cifar_resnet8", *SMALL, "--amp", "bf16", "--device", "cpu"]
    Engine(alone.prepare(parse(words, "", distillation=False), Seed(0, True)), World())
    assert "this processor has no bfloat16: --amp bf16 computes in float32" in capsys.readouterr().out
