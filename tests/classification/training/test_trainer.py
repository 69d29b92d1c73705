"""The times and speeds of a training, and the checks of its weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from classification.training.step import finite
from classification.training.trainer import Trainer
from tests.classification.seams import before_forward, run_trainer
from tests.classification.test_main import options, records


def test_times_are_those_of_the_steps_and_give_the_speed(distil: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    trainers: list[Trainer] = []
    assert run_trainer(options(distil, epochs="1"), trainers.append) == 0
    (trainer,), (record,) = trainers, records(Path(distil[-1]))
    assert record["train_seconds"] == pytest.approx(trainer.progress.seconds)  # summed step by step
    assert record["images_per_second"] * record["train_seconds"] == pytest.approx(27)  # images
    assert not trainer.stepper.scaler.is_enabled()  # without --amp fp16
    assert f"best top-1 {record['valid_top1']:.2f} (epoch 1/1), last" in capsys.readouterr().out


def test_rates_follow_the_cosine_step_by_step_and_checkpoints_their_interval(distil: list[str]) -> None:
    rates, saved = [], []

    def watch(trainer: Trainer) -> None:
        def look(_: int, __: torch.Tensor) -> None:
            rates.append(trainer.stepper.optimizer.param_groups[0]["lr"])
            saved.append(torch.load(Path(distil[-1]) / "last.pth", weights_only=True)["resume"]["step"])

        before_forward(trainer.job, look)

    words = options(distil, epochs="1", lr_schedule="cosine", checkpoint_every_steps="2")
    assert run_trainer(words, watch) == 0
    assert rates == pytest.approx([0.05 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)])
    assert saved == [0, 0, 2, 2]


def test_a_term_that_drowns_the_others_is_reported_once(distil: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_trainer(options(distil, loss_factor="1", lr="1e-9"), lambda _: None) == 0
    assert capsys.readouterr().out.count("!! WARNING: the term mgd is") == 1


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
