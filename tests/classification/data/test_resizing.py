"""Sizes, crops and draws are those of torchvision, bit for bit."""

from __future__ import annotations

import random

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from classification.data.resizing import Fit, random_box, resize


def images() -> list[torch.Tensor]:
    """Images of many sizes and proportions, in both layouts."""
    draw = random.Random(0)
    sizes = [(draw.randint(1, 150), draw.randint(1, 150)) for _ in range(20)] + [(5, 140), (140, 5), (64, 64)]
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator) for size in sizes]
    return [image.permute(2, 0, 1).contiguous() if n % 2 else image.permute(2, 0, 1) for n, image in enumerate(found)]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("squash", [False, True])
def test_resized_and_cropped_in_the_centre(interpolation: str, squash: bool) -> None:
    how = InterpolationMode(interpolation)
    for size, side in ((64, 64), (33, 40), (56, 64)):
        theirs = v2.Compose([v2.Resize([side, side] if squash else side, how), v2.CenterCrop(size)])
        for image in images():
            assert torch.equal(Fit(size, side, interpolation, squash=squash)(image), theirs(image)), image.shape


def test_a_random_box_and_what_was_drawn_for_it() -> None:
    theirs = v2.RandomResizedCrop(32)
    for seed, image in enumerate(images() * 5):
        torch.manual_seed(seed)
        top, left, height, width = theirs.make_params([image]).values()
        drawn = torch.rand(1)
        torch.manual_seed(seed)
        assert random_box(*image.shape[1:]) == (top, left, height, width)
        assert torch.equal(torch.rand(1), drawn)
        part = image[:, top : top + height, left : left + width]
        assert torch.equal(resize(part, (32, 32)), v2.functional.resize(part, [32, 32], antialias=True))
