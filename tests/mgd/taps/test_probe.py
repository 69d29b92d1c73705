"""What a probe tells of a network, for terms to be built from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm, truncnorm
from torch import nn

from mgd import Outputs, Probe, Taps, probe
from tests.mgd.nets import TOY_TAPS, Toy, toy, toy_maps

IMAGES = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))


def expected_margin(bn: nn.BatchNorm2d) -> list[float]:
    """The mean of a normal variable below 0, channel by channel: SciPy's."""
    margins = []
    for mean, scale in zip(bn.bias.tolist(), bn.weight.abs().tolist(), strict=True):
        rare = norm.cdf(-mean / scale) <= 1e-3
        margins.append(-3 * scale if rare else truncnorm.mean(-np.inf, -mean / scale, loc=mean, scale=scale))
    return margins


def test_widths_and_sizes_of_the_maps() -> None:
    net = toy(5)
    found = probe(Taps(net, TOY_TAPS), IMAGES)
    assert found.channels == [5, 5] and found.sizes == [(6, 8), (6, 8)] and found.num_classes == 3
    assert found.paths == TOY_TAPS and (found.weight, found.frozen, found.before_relu) == (1.0, True, False)
    net.eval()
    for feature, expected in zip(found.outputs.features, toy_maps(net, IMAGES), strict=True):
        torch.testing.assert_close(feature, expected)
        assert not feature.requires_grad
    torch.testing.assert_close(found.outputs.logits, net(IMAGES))
    given = Probe(Outputs(torch.zeros(2, 7), [torch.zeros(2, 5, 4, 3), torch.zeros(2, 6, 1, 1)]))
    assert given.channels == [5, 6] and given.sizes == [(4, 3), (1, 1)] and given.num_classes == 7


def test_what_is_said_of_a_teacher_is_kept() -> None:
    found = probe(toy(), IMAGES[:1], weight=2.5, frozen=False)
    assert (found.weight, found.frozen) == (2.5, False)
    assert Probe(found.outputs).frozen  # a teacher unless a peer is meant


def test_the_norm_in_front_of_a_tap_is_named_and_gives_its_margin() -> None:
    net = toy(6)
    found = probe(Taps(net, TOY_TAPS), IMAGES)
    assert found.norms == ("bn1", "bn2")
    for margin, bn in zip(found.margins, (net.bn1, net.bn2), strict=True):
        assert margin is not None and not margin.requires_grad
        np.testing.assert_allclose(margin.numpy(), expected_margin(bn), rtol=1e-4)


def test_a_channel_that_is_hardly_ever_below_zero_has_three_deviations() -> None:
    net = toy(4)
    with torch.no_grad():
        net.bn1.bias[0], net.bn1.weight[0] = 8.0, -2.0
    margin = probe(Taps(net, TOY_TAPS[:1]), IMAGES).margins[0]
    assert margin is not None and margin[0] == -6.0
    np.testing.assert_allclose(margin.numpy(), expected_margin(net.bn1), rtol=1e-4)


def test_behind_an_activation_there_is_no_norm_and_no_margin() -> None:
    found = probe(Taps(toy(), ["relu#0", "relu@in#0"]), IMAGES)
    assert found.norms == (None, "bn1") and found.margins[0] is None and found.margins[1] is not None


def test_a_network_without_taps_has_logits_only() -> None:
    net = toy()
    found = probe(net, IMAGES)
    assert found.channels == [] and found.sizes == []
    assert (found.paths, found.norms, found.margins) == ((), (), ())
    torch.testing.assert_close(found.outputs.logits, net.eval()(IMAGES))


@pytest.mark.parametrize("shape", [(2, 10, 7), (2, 7)])
def test_what_is_no_map_has_no_channels(shape: tuple[int, ...]) -> None:
    found = Probe(Outputs(torch.zeros(2, 3), [torch.zeros(2, 4, 5, 5), torch.zeros(shape)]))
    with pytest.raises(ValueError, match="expected a map"):
        _ = found.channels
    with pytest.raises(ValueError, match="expected a map"):
        _ = found.sizes


def modes(net: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in net.named_modules()}


@pytest.mark.parametrize("tapped", [True, False])
def test_a_network_is_left_as_it_was(tapped: bool) -> None:
    net: Toy = toy().train()
    net.bn1.eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    network = Taps(net, TOY_TAPS) if tapped else net
    before = modes(net)
    probe(network, IMAGES)
    assert modes(net) == before and not before["bn1"] and before["bn2"]
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    assert not net.bn1._forward_hooks and not net.bn2._forward_pre_hooks


def test_the_classifier_is_the_linear_layer_whose_output_the_logits_are() -> None:
    images, network = torch.randn(2, 3, 8, 8), toy()
    found = probe(Taps(network, TOY_TAPS), images).classifier
    assert found is not None and torch.equal(found, network.fc.weight) and not found.requires_grad
    scaled = nn.Sequential(network, nn.Softmax(dim=1))  # whose logits are another layer's output
    assert probe(scaled, images).classifier is None
    assert not network.fc._forward_hooks


def test_margins_of_a_network_that_trains_are_measured() -> None:
    net = toy()
    frozen, peer = (probe(Taps(net, TOY_TAPS), IMAGES, frozen=frozen) for frozen in (True, False))
    assert frozen.margins[0] is not None and list(peer.margins) == list(peer.norms) == [None, None]
