"""Odd pairs train: what scripts/check_pairs.py makes a table of, for three of its pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_pairs import ODD, Pair, falls, train, write

SMALL = [
    Pair("timm:mobilenetv3_small_100", "timm:vit_tiny_patch16_224"),  # maps of a plain transformer's tokens
    Pair("torchvision:resnet18", "timm:mobilenetv3_small_100"),  # a student wider than its teacher
    Pair("timm:ghostnet_050", "timm:repvgg_a0"),
]


@pytest.mark.parametrize("pair", SMALL, ids=lambda pair: pair.name)
def test_an_odd_pair_trains(pair: Pair, tmp_path: Path) -> None:
    row = train(pair)
    assert row["taps"] and falls(row["loss"]) and falls(row["mgd"])
    page = tmp_path / "networks.md"
    page.write_text("# Networks\n\ntext\n")
    for _ in range(2):  # a second time replaces the table
        write([row, {"name": "a <- b", "refused": "no tap"}], page)
    text = page.read_text()
    assert text.startswith("# Networks\n\ntext\n\n## Pairs") and text.count(f"| `{pair.name}` | 64 |") == 1
    assert "2 pairs: the loss falls in 1." in text and "refused: no tap" in text


def test_there_are_sixteen_pairs_of_sixteen_kinds() -> None:
    assert len({pair.name for pair in ODD}) == 16
