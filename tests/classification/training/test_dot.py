"""DOT against its recursions written out, in steps of a run, on parts of batches and on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from classification import main_mgd
from classification.options.groups import Optimisation
from classification.training.dot import DOT
from classification.training.optimizer import build_optimizer, load_optimizer
from mgd import Distiller, Taps, freeze
from mgd.losses import CE, KD, OFD
from tests.classification.runs import ranks
from tests.classification.test_main import options, without
from tests.mgd.nets import TOY_TAPS, toy


def test_by_hand() -> None:
    # Momenta 1/4 and 3/4, rate 1, no decay. Gradients of the labels 1, 0; of the teacher 2, 0.
    weight = nn.Parameter(torch.zeros(1))
    optimizer = DOT([{"params": [weight]}], 1.0, momentum=0.5, delta=0.25, weight_decay=0.0)
    seen = []
    for labels, teacher in ((1.0, 2.0), (0.0, 0.0)):
        optimizer.zero_grad()
        taught = teacher * weight.sum()
        optimizer.note(taught)
        (labels * weight.sum() + taught).backward()
        optimizer.step()
        seen.append(weight.item())
    assert seen == [-3.0, -3.0 - 0.25 - 1.5]


def literal(weights: Tensor, gradients: list[tuple[Tensor, Tensor | None]], delta: float) -> Tensor:
    """Steps of both recursions at rate 0.1, momentum 0.9, decay 0.01, in float64."""
    w, v, u = weights.double(), torch.zeros(()).double(), torch.zeros(()).double()
    for g, h in gradients:
        v = (0.9 - (0 if h is None else delta)) * v + g.double() + 0.01 * w
        u = (0.9 + delta) * u + (0 if h is None else h.double())
        w = w - 0.1 * (v + u)
    return w


def test_equals_the_recursions_and_a_weight_without_a_teacher_has_the_plain_momentum() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(2, 5, generator=generator) for _ in range(4)]
    both, alone = (nn.Parameter(torch.randn(5, generator=generator)) for _ in range(2))
    expected = literal(both.detach(), [(g, h) for g, h in draws], 0.075)
    plain = literal(alone.detach(), [(g, None) for g, _ in draws], 0.075)
    optimizer = DOT([{"params": [both, alone]}], 0.1, momentum=0.9, delta=0.075, weight_decay=0.01)
    for g, h in draws:
        optimizer.zero_grad()
        optimizer.note((h * both).sum() / 2)  # in two parts, as with --accumulate 2
        optimizer.note((h * both).sum() / 2)
        ((g + h) * both).sum().backward()
        (g * alone).sum().backward()
        optimizer.step()
    torch.testing.assert_close(both.detach().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone.detach().double(), plain, rtol=1e-5, atol=1e-6)


def test_without_a_difference_it_is_sgd() -> None:
    found = []
    for kind in ("dot", "plain"):
        whole = Distiller(toy(seed=1), freeze(toy(seed=2)), {"ce": (CE(), 1.0), "kd": (KD(), 2.0)}).train()
        optimizer: Any = torch.optim.SGD(whole.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
        if kind == "dot":
            optimizer = build_optimizer(whole, Optimisation(optimizer="dot", lr=0.1, weight_decay=1e-2, dot_delta=0.0))
        images, target = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
        for _ in range(3):
            optimizer.zero_grad()
            values = whole(images, target)
            if kind == "dot":
                optimizer.note(2.0 * values["kd"])
            values["loss"].backward()
            optimizer.step()
        found.append([p.detach().clone() for p in whole.parameters()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_layers_of_a_term_have_the_plain_momentum_and_the_state_is_loaded() -> None:
    student, teacher = Taps(toy(seed=1), TOY_TAPS), freeze(Taps(toy(), TOY_TAPS))
    widths = [m.shape[1] for m in teacher(torch.zeros(1, 3, 6, 6)).features]
    whole = Distiller(student, teacher, {"ce": (CE(), 1.0), "ofd": (OFD(widths, [widths]), 1.0)})
    optimizer = build_optimizer(whole, Optimisation(optimizer="dot"))
    deltas = {p: group["delta"] for group in optimizer.param_groups for p in group["params"]}
    assert {deltas[p] for p in whole.terms.parameters()} == {0.0}
    assert {deltas[p] for p in student.parameters()} == {0.075}
    values = whole.train()(torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 0, 1]))
    assert isinstance(optimizer, DOT)
    optimizer.note(values["ofd"])
    values["loss"].backward()
    optimizer.step()
    fresh = build_optimizer(whole, Optimisation(optimizer="dot"))
    load_optimizer(fresh, optimizer.state_dict())
    for weight, state in optimizer.state.items():
        assert all(torch.equal(fresh.state[weight][name], value) for name, value in state.items())


def weights_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / "last.pth", weights_only=True)["state_dict"]
    return found


def test_a_run_continues_with_the_same_bits_and_delta_matters(distil: list[str], tmp_path: Path) -> None:
    words = options(without(distil, "--loss-factor"), distiller="kd", optimizer="dot", lr_schedule="step")
    whole, cut, other = (tmp_path / name for name in ("whole", "cut", "other"))
    assert main_mgd.main(options(words, output=str(whole))) == 0
    assert main_mgd.main(options(words, output=str(cut), epochs="1")) == 0
    assert main_mgd.main(options(words, output=str(cut), resume="auto")) == 0
    assert main_mgd.main(options(words, output=str(other), dot_delta="0.05")) == 0
    states = [weights_of(folder) for folder in (whole, cut, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_two_ranks_move_the_weights_as_one_process_does(distil: list[str], tmp_path: Path) -> None:
    # Without batch norms' statistics of each rank's own images: parts of the batch on one process have the same.
    words = options(without(distil, "--loss-factor"), distiller="kd", optimizer="dot", epochs="1", b="6")
    two = options(words, output=str(tmp_path / "two"))
    assert [ended.status for ended in ranks.run([two, two], tmp_path)] == [0, 0]
    assert main_mgd.main(options(words, output=str(tmp_path / "one"), accumulate="2")) == 0
    states = [weights_of(tmp_path / name) for name in ("one", "two")]
    for name, value in states[0].items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": "0.95"}, "momenta of at least 0 and below 1"),
        ({"labels": "0"}, "this run has only kd"),
        ({"optimizer": "sgd", "dot_delta": "0.05"}, "it works only with --optimizer dot"),
    ],
)
def test_refusals(changes: dict[str, str], message: str, distil: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main_mgd.main(options(without(distil, "--loss-factor"), **{"distiller": "kd", "optimizer": "dot", **changes}))
        == 2
    )
    assert message in capsys.readouterr().err
