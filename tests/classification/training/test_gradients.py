"""Gradients that are not finite though the loss is: nothing is updated, and the term and its images are named."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from classification import main_mgd
from classification.data.folders import read_folder
from classification.training.balance import largest_gradient, terms_not_finite
from classification.training.step import SMALLEST_SCALE
from classification.training.trainer import Trainer
from mgd import Batch, Outputs
from mgd.losses import Term
from tests.classification.seams import run_trainer
from tests.classification.test_main import options, records

BAD = 5  # the image whose gradient is not finite


class Root(Term):
    """The square root of 0, whose slope is infinite, for batches that hold one image; else 0."""

    needs = frozenset({"index"})

    def against(self, number: int, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        assert batch.index is not None
        zero = (student.logits.float() * torch.rand(()) * 0).sum()
        return zero.sqrt() if bool((batch.index == BAD).any()) else zero


@pytest.fixture
def words(distil: list[str], tmp_path: Path) -> list[str]:
    file = tmp_path / "root.py"
    file.write_text(f'from {__name__} import Root\n\nTERMS = {{"root": Root}}\n')
    rest = options(distil[: distil.index("--loss-factor")], distiller="kd+root", term_module=str(file))
    return [*rest, *distil[-4:]]


def test_the_largest_gradient_is_the_largest_and_not_finite_where_one_is_not() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.grad = torch.tensor([[1.0, -1e30, 2], [0, 3, 4]])  # whose square is beyond float32
    assert float(largest_gradient(layer)) == pytest.approx(1e30)
    for bad in (torch.nan, torch.inf, -torch.inf):
        layer.bias.grad = torch.tensor([bad, 0])
        assert not largest_gradient(layer).isfinite()
    assert largest_gradient(nn.Linear(3, 2)) == 0


def test_terms_are_named_by_their_own_gradient_and_weight() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    x = layer(torch.ones(1, 1)).sum()
    values = {"fine": x.square(), "root": x.sqrt(), "large": 1e30 * x, "constant": torch.zeros(())}
    weights = {"fine": 1.0, "root": 0.1, "large": 1e30, "constant": 1.0}
    assert terms_not_finite(layer, values, weights) == ["root", "large"]
    assert terms_not_finite(layer, values, {**weights, "large": 1.0}) == ["root"]


@pytest.mark.parametrize("parts", ["1", "2"])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(
    parts: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = read_folder(words[0]).train[BAD][0]
    trainers: list[Trainer] = []
    assert run_trainer(options(words, accumulate=parts), trainers.append) == 1
    error = capsys.readouterr().err
    found = re.search(r"the gradient is not finite in epoch 1/2, step \d though the loss is \(term root; images", error)
    assert found and error.count("\n") == 1
    assert (
        error.count(".png") + int((re.search(r"and (\d) more", error) or [0, 0])[1])
        in ({"1": (6, 7), "2": (3, 4)}[parts])
    )
    assert bad in error or "more" in error
    assert all(
        value.isfinite().all() for value in trainers[0].distiller.state_dict().values() if value.is_floating_point()
    )


def test_steps_of_such_gradients_may_be_left_out(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main_mgd.main([*words, "--skip-nonfinite", "2", "--mixup", "0.2"]) == 2  # root knows images by their number
    assert main_mgd.main(options(words, output=words[-1] + "2", skip_nonfinite="2")) == 0
    assert "left out, 2 of 2" in capsys.readouterr().out
    folder = Path(words[-1] + "2")
    assert records(folder)[-1]["skipped_steps"] == 2
    state = torch.load(folder / "last.pth", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


def test_an_overflow_that_the_scaler_leaves_out_is_no_error_and_one_at_every_scale_is(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def scale(trainer: Trainer, start: float) -> None:
        trainer.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=start)  # --amp fp16 itself needs a GPU

    assert run_trainer(options(words, epochs="1"), partial(scale, start=2.0**16)) == 0
    assert "left out" not in capsys.readouterr().out
    again = options(words, epochs="1", output=words[-1] + "2")
    assert run_trainer(again, partial(scale, start=SMALLEST_SCALE)) == 1
    assert "not finite in float16 at any scale, in epoch 1/1: use --amp bf16" in capsys.readouterr().err
