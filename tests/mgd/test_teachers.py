from __future__ import annotations

import pytest
import torch

import mgd
from tests.mgd.nets import TOY_TAPS, toy


def test_a_frozen_teacher_stays_in_eval_mode_and_builds_no_graph() -> None:
    net = toy()
    teacher = mgd.freeze(mgd.Taps(net, TOY_TAPS))
    images = torch.randn(4, 3, 6, 6, requires_grad=True)
    mean = net.bn1.running_mean.clone()
    outputs = teacher.train()(images)
    assert not net.training and not net.bn1.training
    assert torch.equal(net.bn1.running_mean, mean)
    assert not any(m.requires_grad for m in [outputs.logits, *outputs.features])
    assert not any(p.requires_grad for p in teacher.parameters())
    torch.nn.Sequential(teacher).train()
    assert not net.bn1.training


def test_freezing_twice_changes_nothing() -> None:
    teacher = mgd.freeze(toy())
    assert mgd.freeze(teacher) is teacher


def test_ensemble_is_the_weighted_mean_of_probabilities() -> None:
    nets, images = [toy(seed=s).eval() for s in (0, 1)], torch.randn(4, 3, 6, 6)
    ensemble = mgd.Ensemble([nets[0], mgd.Taps(nets[1], TOY_TAPS)], [1, 3])
    outputs = mgd.freeze(ensemble)(images)
    expected = 0.25 * nets[0](images).softmax(1) + 0.75 * nets[1](images).softmax(1)
    torch.testing.assert_close(outputs.logits.exp(), expected)
    torch.testing.assert_close(outputs.logits.softmax(1), expected)
    assert len(outputs.features) == 2


def test_ensemble_weights_are_checked() -> None:
    for models, weights in (([], None), ([toy()], [1.0, 2.0]), ([toy(), toy()], [1.0, 0.0])):
        with pytest.raises(ValueError, match="positive weight"):
            mgd.Ensemble(models, weights)
