"""A dozen networks of every kind of normalisation as teachers; `scripts/check_networks.py` does all."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_networks import Row, check, networks, page, safely, write_photos

from classification.models import NETWORKS

# How many norms are folded of how many, counted in the networks' source.
FOLDED = {
    # 2 norms in each of 6 blocks and 1 behind them; folded are the second of each block, and the one behind the stem.
    "wrn_16_2": "7 / 13",
    "torchvision:squeezenet1_1": "0 / 0",
    "timm:lcnet_035": "27 / 27",  # the stem's, and 2 in each of 13 blocks
    "timm:test_resnet": "15 / 15",
    "timm:test_byobnet": "14 / 14",
    "timm:test_efficientnet": "13 / 13",
    "timm:test_efficientnet_gn": "0 / 0",
    "timm:test_efficientnet_ln": "0 / 0",
    "timm:test_efficientnet_evos": "0 / 0",
    "timm:test_nfnet": "0 / 0",
    "timm:test_convnext": "0 / 0",
    "timm:test_mambaout": "0 / 0",
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("networks"))


@pytest.mark.parametrize("arch", FOLDED)
def test_a_network_teaches_resumes_and_is_evaluated(arch: str, photos: Path, tmp_path: Path) -> None:
    row = check(arch, 32, photos, tmp_path)
    assert row.works, str(row)
    assert row.folded == FOLDED[arch]


def test_a_network_that_fails_has_a_row_with_the_sentence(photos: Path) -> None:
    row = safely("timm:levit_128s", 32, photos)
    assert not row.works
    assert "does not run at --img-size 32" in row.evaluates and "does not run at --img-size 32" in row.teaches
    assert row.resumes == "not tried"
    unknown = safely("timm:none", 32, photos)
    assert not unknown.works and "unknown architecture" in unknown.teaches


def test_the_table_has_every_named_network_once_and_says_how_many_work() -> None:
    assert set(NETWORKS) <= set(networks())
    rows = [Row("a", 32, "1 / 2", "yes", "yes", "yes"), Row("b", 64, "", "no | not", "not tried", "yes")]
    text = page(rows)
    assert "\n1 of 2 networks work as teachers: " in text
    assert text.endswith("| `a` | 32 | 1 / 2 | yes | yes | yes |\n| `b` | 64 |  | no \\| not | not tried | yes |\n")
