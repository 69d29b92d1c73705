"""Rounding of weights and activations against the formula, and where a file rounds against a list made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classification import export
from classification.data.preprocessing import Preprocessing
from classification.errors import UserError
from classification.models.fake_quantised import INPUT, FakeQuantisation, Sites, fold, round_weight
from classification.models.trained import Trained

needs_onnx = pytest.mark.skipif(bool(export.missing_packages("onnx")), reason="needs the extra [export]")


class Small(nn.Module):
    """A convolution with a norm, a residual sum in place, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        out = self.norm(self.conv(images))
        out += images
        logits: Tensor = self.head(self.relu(out).mean((2, 3)))
        return logits


def test_a_weight_is_rounded_per_channel_by_its_largest_value() -> None:
    weight = torch.tensor([[1.27, -0.634, 0.004], [0.0, 0.0, 0.0], [-12.7, 0.06, 0.04]], requires_grad=True)
    rounded = round_weight(weight)
    expected = torch.tensor([[1.27, -0.63, 0.0], [0.0, 0.0, 0.0], [-12.7, 0.1, 0.0]])
    torch.testing.assert_close(rounded, expected)
    rounded.sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.ones(3, 3))


def test_a_folded_norm_computes_the_same() -> None:
    torch.manual_seed(0)
    norm, images = nn.BatchNorm2d(4).eval(), torch.randn(2, 3, 5, 5)
    for value in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        assert value is not None
        value.uniform_(0.5, 2)
    weight, bias = torch.randn(4, 3, 3, 3), torch.randn(4)
    torch.testing.assert_close(F.conv2d(images, *fold(weight, bias, norm)), norm(F.conv2d(images, weight, bias)))
    torch.testing.assert_close(F.conv2d(images, *fold(weight, None, norm)), norm(F.conv2d(images, weight)))


def test_scales_are_calibrated_used_and_learned_by_the_formula() -> None:
    network = nn.Sequential(nn.ReLU())
    both = FakeQuantisation(Sites({INPUT: ("images",), "relu:0": ("relu",)}, {}, frozenset()))
    found = FakeQuantisation(Sites({"relu:0": ("relu",)}, {}, frozenset()))
    images = torch.tensor([[-1.0, 0.0, 0.3337, 1.55]])
    for each in (both, found):
        each.calibrate(network, [images])
    step = 1.55 / 255
    scales = {key: (round(scale, 6), zero) for key, (scale, zero) in both.describe().items()}
    assert scales == {"input:0": (0.01, 100), "relu:0": (round(step, 6), 0)}
    found.attach(network)
    given = torch.tensor([[-3.0, 0.3337, 2.0]], requires_grad=True)
    result = network(given)
    torch.testing.assert_close(result, torch.tensor([[0.0, 55 * step, 1.55]]))  # 0.3337 / step = 54.9
    result.sum().backward()
    assert given.grad is not None and given.grad.tolist() == [[0.0, 1.0, 0.0]], "nothing through what is clamped"
    assert found.log_scales.grad is not None
    # By s: q - x / s inside, the last step outside; s times that by log s.
    torch.testing.assert_close(found.log_scales.grad, torch.tensor([55 * step - 0.3337 + 1.55]), atol=1e-5, rtol=0)


@needs_onnx
def test_the_sites_of_a_small_network() -> None:
    from classification.models.rounding import find_sites

    trained = Trained(Path(), Small().eval(), "small", 2, None, Preprocessing.of(8, "pad"), "")
    sites = find_sites(trained)
    assert list(sites.tensors) == [INPUT, "batch_norm:0", "relu:0", "mean:0", "linear:0"]
    assert sites.folded == {"conv2d:0": "norm"} and sites.norms == {"batch_norm:0"}


class Hidden(nn.Module):
    """Its attention rounds inside of one function."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.attention(tokens, tokens, tokens)[0].mean(1))
        return logits


@needs_onnx
def test_what_rounds_inside_of_a_function_is_refused() -> None:
    from classification.models.rounding import find_sites

    trained = Trained(Path(), Hidden().eval(), "hidden", 2, None, Preprocessing.of(8, "pad"), "")
    with pytest.raises(UserError, match=r"hidden cannot train for int8: its int8 file rounds .* inside functions"):
        find_sites(trained)
