"""Costs against cases by hand and the figures that torchvision publishes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torchvision
from torch import Tensor, nn

from classification.models.cost import count_macs, count_parameters, measure_costs, median_times


def small() -> nn.Module:
    """A convolution to 4 x 4 maps of 5 channels, and a head of 7 classes."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 7)
    ).eval()


class Attention(nn.Module):
    """Attention of 4 tokens of 8 numbers over themselves; images of 2 px, each pixel a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.layer(self.embed(images.flatten(2).transpose(1, 2)))
        return tokens.mean(1)


def test_costs_by_hand() -> None:
    found = measure_costs({"student": (small(), 8)})["student"]
    assert found["macs"] == 16 * 27 * 5 + 80 * 7
    assert found["parameters"] == (27 * 5 + 5) + 10 + (80 * 7 + 7)
    assert found["bytes"] == 4 * (found["parameters"] + 10) + 8  # two statistics per channel, a counter of 8 bytes
    assert found["megabytes"] == pytest.approx(found["bytes"] / 1e6)
    assert set(found["latency_ms"]) == {"1", "32"} and min(found["latency_ms"].values()) > 0
    assert found["device"] == "cpu" and found["threads"] == torch.get_num_threads() and found["instructions"]


def test_attention_is_counted() -> None:
    """Torch computes such a layer by one operator of its own where no gradient is asked for."""
    projections, products, feed_forward = 4 * 4 * 8 * 8, 2 * 4 * 4 * 8, 2 * 4 * 8 * 16
    assert count_macs(Attention().eval(), 2) == 4 * 3 * 8 + projections + products + feed_forward
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("name", ["ResNet50", "MobileNet_V2"])
def test_macs_are_those_that_torchvision_publishes(name: str) -> None:
    about = getattr(torchvision.models, f"{name}_Weights").IMAGENET1K_V1.meta
    with torch.device("meta"):
        network = torchvision.models.get_model(name.lower()).eval()
    assert (count_macs(network, 224) or 0) / 1e9 == pytest.approx(about["_ops"], abs=5e-4)
    assert count_parameters(network)["parameters"] == about["num_params"]


def test_what_cannot_be_counted_is_unknown() -> None:
    class Opaque(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("not under a mode")

    assert count_macs(Opaque(), 8) is None


def test_medians_are_measured_in_turn() -> None:
    called: list[int] = []
    now = [0.0]

    def call(which: int, seconds: list[float]) -> None:
        called.append(which)
        now[0] += seconds.pop(0)

    first: Callable[[], object] = partial(call, 0, [9.0, 9.0, 1.0, 2.0, 6.0])
    second = partial(call, 1, [9.0, 9.0, 4.0, 4.0, 5.0])
    assert median_times([first, second], seconds=0, clock=lambda: now[0]) == [2000, 4000]
    assert called == [0, 1] * 5  # two to warm up, three that count
