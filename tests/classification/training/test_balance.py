from __future__ import annotations

import pytest
import torch
from torch import nn

from classification.runs.balance import balanced
from classification.training.balance import dominant, gradient_shares, noted_maps, pair_shares
from mgd import Taps


def test_shares_are_those_of_the_gradients_norms() -> None:
    student = nn.Linear(2, 1, bias=False)
    weight = student.weight
    values = {"a": 3 * weight[0, 0], "b": 4 * weight[0, 1], "c": torch.tensor(5.0, requires_grad=True) * 1}
    shares = gradient_shares([(student, ["a", "b", "c"])], values, {"a": 1.0, "b": 0.5, "c": 1.0})
    assert {name: round(float(share.detach()), 6) for name, share in shares.items()} == {"a": 0.6, "b": 0.4, "c": 0.0}
    assert weight.grad is None
    nothing = gradient_shares([(student, ["a", "b"])], {name: 0 * values[name] for name in "ab"}, {"a": 1.0, "b": 1.0})
    assert {name: float(share) for name, share in nothing.items()} == {"a": 0.0, "b": 0.0}
    assert gradient_shares([(student, ["a"])], {"a": values["a"]}, {"a": 1.0}) == {}


def test_balanced_weights_give_equal_shares() -> None:
    assert balanced({"a": 1.0, "b": 0.5, "c": 2.0}, {"a": 0.6, "b": 0.3, "c": 0.0}) == {"a": 1.0, "b": 1.0, "c": 2.0}
    assert balanced({"a": 1.0, "b": 0.5, "c": 2.0}, {"a": 0.0, "b": 0.2, "c": 0.4}) == {"a": 1.0, "b": 0.5, "c": 1.0}


def test_every_network_shares_its_own_gradient() -> None:
    networks = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    values = {f"{name}{n}": factor * net.weight.sum() for n, net in enumerate(networks) for name, factor in TWO.items()}
    groups = [(net, [f"{name}{n}" for name in TWO]) for n, net in enumerate(networks)]
    shares = gradient_shares(groups, values, dict.fromkeys(values, 1.0))
    assert {name: round(float(share), 6) for name, share in shares.items()} == {
        "a0": 0.25,
        "b0": 0.75,
        "a1": 0.25,
        "b1": 0.75,
    }


def test_weights_that_do_not_train_and_narrow_types_do_not_count() -> None:
    student = nn.Linear(300, 1).bfloat16()
    student.bias.requires_grad_(False)
    values = {name: factor * student.weight.sum() + student.bias.sum() for name, factor in TWO.items()}
    shares = gradient_shares([(student, list(TWO))], values, dict.fromkeys(TWO, 1.0))
    assert float(shares["a"]) == pytest.approx(0.25, abs=1e-5) and shares["a"].dtype == torch.float32


TWO = {"a": 1.0, "b": 3.0}


def test_a_term_that_drowns_the_others_is_named() -> None:
    assert dominant({"ce": 1.0, "mgd": 150.0}) is None
    assert dominant({"ce": 1.0}) is None
    warning = dominant({"ce": 1.0, "mgd": 400.0})
    assert warning is not None and "mgd is 400 times" in warning and "--term mgd.weight=" in warning
    warning = dominant({"ce": 1.0, "kd": 400.0})
    assert warning is not None and "lower its weight" in warning
    with pytest.raises(ValueError, match="empty"):
        dominant({})


def test_a_pair_has_the_gradient_that_reaches_the_weights_through_its_map_alone() -> None:
    """y = a x and z = b y; the term 3 y + 4 z has the parts 3 x on a, and (4 b x, 4 y) on (a, b)."""
    first, second = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
    with torch.no_grad():
        first.weight.fill_(2.0)
        second.weight.fill_(0.5)
    net = nn.Sequential(first, second, nn.Flatten())
    taps = Taps(net, ["0@first", "1@first"])
    with noted_maps(taps) as maps:
        outputs = taps(torch.full((1, 1, 1, 1), 1.0))
        value = 3 * outputs.features[0].sum() + 4 * outputs.features[1].sum()
        shares = pair_shares(net, maps, value)
    parts = torch.tensor([3.0, (2.0**2 + 8.0**2) ** 0.5])
    torch.testing.assert_close(shares, parts / parts.sum())
    assert first.weight.grad is None
    assert taps(torch.ones(1, 1, 1, 1)).features[0].grad_fn is not maps[0].grad_fn  # the hook is gone


def test_a_term_that_reads_no_map_has_no_pairs() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten())
    taps = Taps(net, ["0@first"])
    with noted_maps(taps) as maps:
        outputs = taps(torch.ones(1, 1, 1, 1))
        assert pair_shares(net, maps, outputs.logits.sum()).tolist() == [0.0]
        assert pair_shares(net, maps, torch.tensor(1.0)).tolist() == [0.0]
