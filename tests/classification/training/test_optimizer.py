from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import Muon
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from classification import main_base, main_mgd
from classification.options.groups import Optimisation
from classification.training.optimizer import build_optimizer, load_optimizer
from mgd import Distiller, Taps, freeze
from mgd.losses import CE, OFD
from tests.classification.conftest import SMALL, STUDENT
from tests.classification.test_main import options, records, without
from tests.mgd.nets import TOY_TAPS, toy


def distiller() -> Distiller:
    student, teacher = Taps(toy(seed=1), TOY_TAPS), freeze(Taps(toy(), TOY_TAPS))
    widths = [m.shape[1] for m in teacher(torch.zeros(1, 3, 6, 6)).features]
    return Distiller(student, teacher, {"ce": (CE(), 1.0), "ofd": (OFD(widths, [widths]), 1.0)})


def stepped(kind: str, momentum: float = 0.9, decay: float = 1e-4) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    whole = distiller().train()
    args = Optimisation(optimizer=kind, lr=0.1, momentum=momentum, weight_decay=decay)
    optimizer = build_optimizer(whole, args)
    whole(torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 0, 1]))["loss"].backward()
    optimizer.step()
    return optimizer


def first_step(kind: str, weight: Tensor, gradient: Tensor, rate: float, decay: float) -> Tensor:
    """The first step of Adam is the sign of the gradient; AdamW's decay and LAMB's length by their papers, float64."""
    weight, gradient = weight.double(), gradient.double()
    direction = gradient / (gradient.abs() + (1e-8 if kind == "adamw" else 1e-6))
    if kind == "adamw":
        return weight - rate * decay * weight - rate * direction
    direction = direction + decay * weight
    return weight - rate * weight.norm() / direction.norm() * direction if decay else weight - rate * direction


@pytest.mark.parametrize("no_decay", ["none", "norms"])
@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_first_steps_are_those_of_the_papers(kind: str, no_decay: str) -> None:
    torch.manual_seed(0)
    whole = Distiller(nn.Sequential(nn.Linear(6, 4)), freeze(nn.Identity()), {"ce": (CE(), 1.0)})
    options = Optimisation(optimizer=kind, lr=0.1, weight_decay=0.3, momentum=0.8, no_decay=no_decay)
    optimizer = build_optimizer(whole, options)
    assert all(group["betas"] == (0.8, 0.999) for group in optimizer.param_groups)
    weights = list(whole.parameters())
    assert [weight.ndim for weight in weights] == [2, 1]
    expected = []
    for weight in weights:
        weight.grad = torch.randn_like(weight)
        decay = 0.0 if no_decay == "norms" and weight.ndim == 1 else 0.3
        expected.append(first_step(kind, weight.detach(), weight.grad, 0.1, decay))
    optimizer.step()
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach().double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "muon", "adamw", "lamb"])
def test_vectors_alone_are_spared_the_decay(kind: str) -> None:
    optimizer = build_optimizer(distiller(), Optimisation(optimizer=kind, no_decay="norms", weight_decay=0.01))
    decays = {(p.ndim > 1, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(True, 0.01), (False, 0.0)}


@pytest.mark.parametrize("kind", ["sgd", "muon", "adamw", "lamb"])
def test_everything_that_trains_is_updated_and_no_teacher(kind: str) -> None:
    whole = distiller()
    args = Optimisation(optimizer=kind, lr=0.1, momentum=0.9, weight_decay=0.0)
    held = [p for group in build_optimizer(whole, args).param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) and {id(p) for p in held} == {id(p) for p in whole.parameters()}
    assert not {id(p) for p in held} & {id(p) for p in whole.teachers[0].parameters()}


def test_muon_makes_the_steps_of_the_students_convolutions_orthogonal_and_of_nothing_else() -> None:
    optimizer = stepped("muon")
    assert isinstance(optimizer, Muon)
    used = {p: optimizer.state[p]["use_muon"] for group in optimizer.param_groups for p in group["params"]}
    assert {p.ndim for p, yes in used.items() if yes} == {4}
    assert any(p.ndim == 4 for p, yes in used.items() if not yes)  # the regressors of the term

    weight = nn.Conv2d(8, 16, 3, bias=False)
    toy_ = Distiller(nn.Sequential(weight), freeze(nn.Identity()), {"ce": (CE(), 1.0)})
    optimizer = build_optimizer(toy_, Optimisation(optimizer="muon", lr=0.1, momentum=0.9, weight_decay=0.0))
    before = weight.weight.detach().clone()
    weight.weight.grad = torch.randn_like(before)
    optimizer.step()
    spread = {}
    for what, matrix in (("step", weight.weight.detach() - before), ("gradient", weight.weight.grad)):
        values = torch.linalg.svdvals(matrix.flatten(1))
        spread[what] = float(values.max() / values.min())
    assert spread["step"] < 1.6 < 2.2 < spread["gradient"]


@pytest.mark.parametrize("kind", ["sgd", "muon"])
def test_every_group_has_the_options(kind: str) -> None:
    for group in stepped(kind, decay=1e-2).param_groups:
        asked = (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"])
        assert asked == (0.1, 0.9, 1e-2, True)


def orthogonalised(gradient: torch.Tensor) -> torch.Tensor:
    """The quintic iteration of Jordan et al., 2024, with one triple of coefficients a step, literally, in float64."""
    steps = [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046)]
    x = gradient.double() / gradient.double().norm()
    for a, b, c in [*steps, (2.8366, -3.0525, 1.2012)]:
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    out: Tensor = x
    return out


@pytest.mark.parametrize("hardware", [True, False])
def test_muon_orthogonalises_in_float32_where_the_device_lacks_bfloat16(
    hardware: bool,
) -> None:
    torch.manual_seed(0)
    weight = nn.Conv2d(4, 8, 3, bias=False)
    whole = Distiller(nn.Sequential(weight), freeze(nn.Identity()), {"ce": (CE(), 1.0)})
    args = Optimisation(optimizer="muon", lr=1.0, momentum=0.0, weight_decay=0.0)
    optimizer = build_optimizer(whole, args, bfloat16=hardware)
    before = weight.weight.detach().clone()
    weight.weight.grad = torch.randn_like(before)
    optimizer.step()
    expected = before.flatten(1) - 0.2 * 36**0.5 * orthogonalised(weight.weight.grad.flatten(1))
    wrong = float((weight.weight.detach().flatten(1) - expected).abs().max())
    assert wrong > 1e-3 if hardware else wrong < 1e-5
    saved = optimizer.state_dict()
    load_optimizer(build_optimizer(whole, args, bfloat16=not hardware), saved)


def test_muon_moves_the_convolutions_of_every_peer() -> None:
    peers = Distiller.mutual([toy(seed=n) for n in range(2)], [{"ce": (CE(), 1.0)}] * 2)
    optimizer = build_optimizer(peers, Optimisation(optimizer="muon", lr=0.1, momentum=0.9, weight_decay=0.0))
    hidden = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert hidden == {id(p) for p in peers.parameters() if p.ndim == 4}


@pytest.mark.parametrize("kind", ["sgd", "muon"])
def test_momenta_are_taken_up_and_rates_are_not(kind: str) -> None:
    saved, optimizer = stepped(kind).state_dict(), stepped(kind, 0.5, 1e-2)
    saved["state"][0]["momentum_buffer"] += 1
    load_optimizer(optimizer, saved)
    assert optimizer.param_groups[0]["momentum"] == 0.5 and optimizer.param_groups[0]["weight_decay"] == 1e-2
    weight = optimizer.param_groups[0]["params"][0]
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], saved["state"][0]["momentum_buffer"])


@pytest.mark.parametrize(
    ("kind", "number", "entry", "message"),
    [
        ("sgd", 0, {"momentum_buffer": torch.zeros(77)}, "momentum_buffer of weight 0 does not fit"),
        ("sgd", 0, {"momentum_buffer": torch.tensor(0.0)}, "momentum_buffer of weight 0 does not fit"),
        ("sgd", 1, {"momentum_buffer": torch.tensor(torch.inf)}, "not finite"),
        ("sgd", 1, {"momentum_buffer": True}, "is True"),
        ("sgd", 1, {"momentum_buffer": "none"}, "is 'none'"),
        ("sgd", 77, {"momentum_buffer": None}, "a state 77"),
        ("sgd", -1, {"momentum_buffer": None}, "a state -1"),
        ("sgd", 0, {"exp_avg": torch.tensor(0.0)}, "of .'exp_avg'."),
        ("muon", 0, {"exp_avg": torch.zeros(77)}, "exp_avg of weight 0 does not fit"),
        ("muon", 0, {"step": torch.zeros(2)}, "step of weight 0 does not fit"),
        ("adamw", 0, {"exp_avg": torch.zeros(77)}, "exp_avg of weight 0 does not fit"),
        ("lamb", 0, {"step": torch.tensor(1.0)}, "of .'step'."),
        ("muon", 0, {"velocity": torch.tensor(0.0)}, "of .'velocity'."),
    ],
)
def test_momenta_of_something_else_are_refused(kind: str, number: int, entry: dict[str, object], message: str) -> None:
    saved = stepped(kind).state_dict()
    saved["state"][number] = entry
    with pytest.raises(ValueError, match=message):
        load_optimizer(stepped(kind), saved)


def test_a_number_of_steps_that_is_none_is_refused() -> None:
    saved = stepped("lamb").state_dict()
    for steps in (torch.tensor(math.inf), torch.zeros(2), "two"):
        saved["param_groups"][0]["step"] = steps
        with pytest.raises(ValueError, match="its optimizer has done"):
            load_optimizer(stepped("lamb"), saved)


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_a_run_with_all_of_it_resumes_with_the_same_bits(kind: str, distil: list[str], tmp_path: Path) -> None:
    more = {"no_decay": "norms", "clip_gradients": "0.5", "randaugment": "9", "random_erasing": "0.5", "repeats": "2"}
    words = options(distil, optimizer=kind, lr="0.01", wd="0.05", epochs="2", distiller="kd", **more)
    words = without(words, "--loss-factor")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main_mgd.main(options(words, output=str(whole), keep_checkpoints="5")) == 0
    losses = [line["train_loss"] for line in records(whole)]
    assert losses[-1] < losses[0]
    shutil.copytree(whole, cut)
    assert main_mgd.main(["--resume", str(cut / "epoch0001.pth")]) == 0
    assert len(records(cut)) == 2
    states: list[dict[str, Any]] = [torch.load(f / "last.pth", weights_only=True)["state_dict"] for f in (whole, cut)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    # Another division of the weights begins with fresh momenta.
    assert main_mgd.main(["--resume", str(cut), "--no-decay", "none", "--epochs", "3"]) == 2
    assert main_mgd.main(["--resume", str(cut), "--no-decay", "none", "--epochs", "3", "--resume-override", "1"]) == 0


@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_a_gradient_that_is_too_long_is_shrunk_to_the_norm(accumulate: str, photos: Path, tmp_path: Path) -> None:
    norms: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(sum(gradient.double().square().sum() for gradient in gradients) ** 0.5))

    words = [str(photos), "-a", STUDENT, *SMALL, "--epochs", "1", "--accumulate", accumulate]
    handle = register_optimizer_step_pre_hook(note)
    assert main_base.main([*words, "--output", str(tmp_path / "free")]) == 0
    free = norms.copy()
    norms.clear()
    limit = str(min(free[0], 0.3))
    assert main_base.main([*words, "--output", str(tmp_path / "clipped"), "--clip-gradients", limit]) == 0
    handle.remove()
    assert max(norms) <= float(limit) * 1.0001 and norms[0] == pytest.approx(float(limit), rel=1e-3)


def test_a_run_with_muon_learns_and_continues_with_the_same_bits(distil: list[str], tmp_path: Path) -> None:
    words = options(distil, optimizer="muon", lr="0.03", wd="0.05", epochs="4", mgd_update_freq="2")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main_mgd.main(options(words, output=str(whole))) == 0
    losses = [line["train_loss"] for line in records(whole)]
    assert losses[-1] < 0.8 * losses[0]
    assert main_mgd.main(options(words, output=str(cut), epochs="2", lr_schedule="step")) == 0
    assert main_mgd.main(options(words, output=str(cut), resume="auto", lr_schedule="step")) == 0
    states: list[dict[str, Any]] = [torch.load(f / "last.pth", weights_only=True)["state_dict"] for f in (whole, cut)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("more", ["--lr-drop-epochs 1 2", "--lr-schedule cosine", "--warmup 1 --warmup-epochs 2"])
def test_steps_are_made_at_the_rate_of_the_schedule(more: str, photos: Path, tmp_path: Path) -> None:
    rates: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rates.append(optimizer.param_groups[0]["lr"])

    epochs = "1" if "warmup" in more else "3"
    words = [str(photos), "-a", STUDENT, *SMALL, "--epochs", epochs, "--output", str(tmp_path / "run"), *more.split()]
    handle = register_optimizer_step_pre_hook(note)
    assert main_base.main(words) == 0
    handle.remove()
    expected = {
        "--lr-drop-epochs 1 2": [0.05] * 4 + [0.005] * 4 + [0.0005] * 4,
        "--lr-schedule cosine": [0.025 * (1 + math.cos(math.pi * n / 12)) for n in range(12)],
        "--warmup 1 --warmup-epochs 2": [0.005] * 4 + [0.0275] * 4 + [0.05] * 4,
    }[more]
    assert rates == pytest.approx(expected)
    assert [line["learning_rate"] for line in records(tmp_path / "run")] == pytest.approx(expected[::4])
