"""The times and speeds of a training, and the checks of its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from classification.training.step import finite
from classification.training.trainer import Trainer
from tests.classification.seams import before_forward, run_trainer
from tests.classification.test_main import options, records


def test_times_are_those_of_the_steps_and_give_the_speed(distil: list[str]) -> None:
    trainers: list[Trainer] = []
    assert run_trainer(options(distil, epochs="1"), trainers.append) == 0
    (trainer,), (record,) = trainers, records(Path(distil[-1]))
    assert record["train_seconds"] == pytest.approx(trainer.progress.seconds)  # summed step by step
    assert record["images_per_second"] * record["train_seconds"] == pytest.approx(27)  # images
    assert not trainer.stepper.scaler.is_enabled()  # without --amp fp16


def test_a_signal_ends_the_run_behind_the_step_in_which_it_comes(distil: list[str]) -> None:
    def stop(trainer: Trainer) -> None:
        def signal(number: int, _: torch.Tensor) -> None:
            if number == 2:
                assert trainer.engine.interrupt is not None
                trainer.engine.interrupt.signal = 15

        before_forward(trainer.job, signal)

    assert run_trainer(distil, stop) == 143
    last = torch.load(Path(distil[-1]) / "last.pth", weights_only=True)
    assert (last["resume"]["epoch"], last["resume"]["step"]) == (0, 2)


def test_weights_are_finite_where_all_that_train_are() -> None:
    layer = nn.Linear(2, 2)
    assert finite(layer) and finite(nn.ReLU())
    layer.bias.requires_grad = False
    layer.bias.data.fill_(torch.nan)
    assert finite(layer)  # it does not train
    layer.weight.data[1, 0] = torch.inf
    assert not finite(layer)
