"""Tapped networks, teachers and distillers that are pickled, saved whole, or copied."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mgd
from tests.mgd.nets import TOY_TAPS, Toy, toy, toy_maps


def saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing)), saved]


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


@pytest.mark.parametrize("twin", COPIES)
def test_a_copy_reads_its_own_network(twin: Callable[[Any], Any]) -> None:
    taps, images = mgd.Taps(toy(), TOY_TAPS), torch.randn(2, 3, 6, 6)
    taps(images)
    other = twin(twin(taps))
    other.model.conv1.weight.data.mul_(2)
    for each in (taps, other, taps):
        each.eval()
        assert isinstance(each.model, Toy)
        for _ in range(2):
            for got, expected in zip(each(images).features, toy_maps(each.model, images), strict=True):
                torch.testing.assert_close(got, expected)
        assert hooks(each.model) == len(TOY_TAPS)
    other.close()
    assert hooks(other.model) == 0 and hooks(taps.model) == len(TOY_TAPS)
    assert isinstance(taps.model, Toy) and other.model.relu.inplace and not taps.model.relu.inplace


@pytest.mark.parametrize("twin", COPIES)
def test_the_network_alone_runs_as_before(twin: Callable[[Any], Any]) -> None:
    net, images = toy().eval(), torch.randn(2, 3, 6, 6)
    expected = net(images)
    taps = mgd.Taps(net, [*TOY_TAPS, "bn1"])
    net.to(torch.float64).float()
    assert b"Taps" not in pickle.dumps(taps.model)
    alone = twin(taps.model)
    torch.testing.assert_close(alone(images), expected)
    taps(images)  # the copy's hooks do not reach into these taps
    torch.testing.assert_close(alone(images), expected)
    again = mgd.Taps(alone, TOY_TAPS)
    for got, wanted in zip(again(images).features, toy_maps(alone, images), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("twin", COPIES)
def test_a_frozen_teacher_and_a_distiller_compute_the_same(twin: Callable[[Any], Any]) -> None:
    images, target = torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 0])
    teacher = mgd.freeze(mgd.Taps(toy(seed=1), TOY_TAPS))
    terms: dict[str, tuple[nn.Module, float]] = {"kd": (mgd.losses.KD(), 2.0), "at": (mgd.losses.AT(), 1.0)}
    distiller = mgd.Distiller(mgd.Taps(toy(), TOY_TAPS), teacher, terms)
    expected = distiller(images, target)
    other = twin(distiller)
    for _ in range(2):
        for name, value in other(images, target).items():
            torch.testing.assert_close(value, expected[name])
    teacher._copies[torch.device("meta")] = mgd.freeze(nn.Linear(1, 1))  # as for another device
    frozen = twin(teacher)
    assert not frozen._copies
    assert torch.equal(frozen.train()(images).logits, teacher(images).logits)
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.taps.training
    other.student.model.conv1.weight.data.mul_(2)
    torch.testing.assert_close(distiller(images, target)["loss"], expected["loss"])
