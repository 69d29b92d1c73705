"""What scripts/check_taps.py takes for the right order of a map's positions, and what not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from check_taps import order, stays, write
from torch import Tensor, nn

SIDE, STRIDE = 8, 4


class Mixed(nn.Module):
    """A convolution whose positions are then put into an order, with a blur of the depth of a large network."""

    def __init__(self, places: Tensor, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.places = places
        self.stem = nn.Conv2d(3, 16, STRIDE, STRIDE)
        blocks = [(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(depth)]
        self.blocks = nn.Sequential(*(layer for block in blocks for layer in block))
        self.map = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.blocks(self.stem(images))
        maps = self.map(maps.flatten(2)[:, :, self.places].unflatten(2, (SIDE, SIDE)))
        return maps.mean((2, 3))


RASTER = torch.arange(SIDE * SIDE).view(SIDE, SIDE)
ORDERS = {
    "raster": RASTER.flatten(),
    "columns first": RASTER.T.flatten(),
    "upside down": RASTER.flip(0).flatten(),
    # As in a network that computes in windows and does not put them together again.
    "windows of 4": RASTER.view(2, 4, 2, 4).permute(0, 2, 1, 3).flatten(),
    "windows of 2": RASTER.view(4, 2, 4, 2).permute(0, 2, 1, 3).flatten(),
    "unrolled": RASTER.view(2, 2, 2, 2, 2, 2).permute(0, 3, 1, 4, 2, 5).flatten(),
    "by chance": torch.randperm(SIDE * SIDE, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("depth", [0, 8])
def test_only_the_order_of_the_image_passes(name: str, depth: int) -> None:
    network = Mixed(ORDERS[name], depth).eval()
    said = order(network, SIDE * STRIDE, [("map", (SIDE, SIDE))])
    assert (said == "yes") == (name == "raster"), said


def test_a_map_in_its_own_place_changes_nothing() -> None:
    network = Mixed(ORDERS["raster"], 1).eval()
    images = torch.randn(2, 3, SIDE * STRIDE, SIDE * STRIDE)
    assert stays(network, "map", images) == "yes"


def test_networks_without_a_record_keep_their_line(tmp_path: Path) -> None:
    page = tmp_path / "networks.md"
    refused = {"name": "timm:tnt_s_patch16_224", "size": 224, "refused": "no tap"}
    write([{"name": "timm:resnet18d", "size": 128, "taps": [], "stays": "yes", "moves": "yes"}, refused], page)
    page.write_text(page.read_text() + "\n## Pairs that train\n\n| `timm:resnet18d <- b` |\n")
    write([{"name": "timm:lcnet_035", "size": 128, "taps": [], "stays": "yes", "moves": "a: 1 of 9 near"}], page)
    text = page.read_text()
    assert "3 networks: taps found in 2, all checks passed in 1, 1 refused; " in text
    places = [text.index(f"| `timm:{name}` |") for name in ("resnet18d", "lcnet_035", "tnt_s_patch16_224")]
    assert places == sorted(places) and text.endswith("\n\n## Pairs that train\n\n| `timm:resnet18d <- b` |\n")
