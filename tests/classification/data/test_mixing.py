from __future__ import annotations

from typing import Any

import pytest
import torch

from classification.data.mixing import make_mixer
from classification.options.groups import Data

IMAGES = torch.eye(6)[:, None, :, None].expand(6, 3, 6, 5).clone()  # image n is 1 in row n, else 0
TARGET = torch.arange(6)


def mix(mixup: float = 0.0, cutmix: float = 0.0) -> Any:
    return make_mixer(Data(mixup=mixup, cutmix=cutmix), 6)


def test_mixup_gives_labels_the_share_of_their_images() -> None:
    torch.manual_seed(0)
    images, target = mix(mixup=1.0)(IMAGES, TARGET)
    assert target.shape == (6, 6) and len(target.unique()) == 3  # lambda, 1 - lambda, 0
    torch.testing.assert_close(images[:, 0, :, 0], target)


def test_cutmix_gives_labels_the_share_of_the_area() -> None:
    torch.manual_seed(1)
    ones = torch.arange(6.0)[:, None, None, None].expand(6, 3, 20, 20).clone()
    images, target = mix(cutmix=1.0)(ones, TARGET)
    for image, row in zip(images, target, strict=True):
        share = torch.stack([(image[0] == label).float().mean() for label in range(6)])
        torch.testing.assert_close(share, row)


def test_a_coin_decides_between_both() -> None:
    torch.manual_seed(0)
    chosen = mix(mixup=1.0, cutmix=1.0)
    blended = [bool(((m := chosen(IMAGES, TARGET)[0]) > 0).logical_and(m < 1).any()) for _ in range(30)]
    assert 5 < sum(blended) < 25


def test_without_labels_images_are_mixed_alone() -> None:
    images, target = mix(mixup=1.0)(IMAGES, None)
    assert target is None and not torch.equal(images, IMAGES)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_small_alpha_mixes_little(kind: str) -> None:
    torch.manual_seed(0)
    least = {
        alpha: sum(bool(mix(**{kind: alpha})(IMAGES, TARGET)[1][0].max() < 0.9) for _ in range(60))
        for alpha in (0.1, 4.0)
    }
    assert least[0.1] < 30 < 50 < least[4.0]


def test_nothing_is_mixed_by_default() -> None:
    assert mix() is None


@pytest.mark.parametrize("num", [1, 5])
def test_odd_batches_are_mixed(num: int) -> None:
    images, target = mix(mixup=1.0)(IMAGES[:num], TARGET[:num])
    torch.testing.assert_close(target.sum(1), torch.ones(num))
    assert len(images) == num
