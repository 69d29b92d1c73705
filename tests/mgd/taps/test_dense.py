"""Networks that take lists of images and return boxes or losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mgd import Taps, dry_forward, freeze, probe
from tests.mgd.nets import has_gradient, toy


class Boxes(nn.Module):
    """A detector's ways: a list of images, which it brings to one batch; losses in training, boxes else."""

    def __init__(self, turn: bool = False) -> None:
        super().__init__()
        self.conv, self.seen, self.turn = nn.Conv2d(3, 4, 2, 2), nn.Identity(), turn

    def forward(self, images: list[Tensor], targets: list[int] | None = None) -> Any:
        # The longer side becomes 8, the shorter one shrinks with it.
        small = [nn.functional.interpolate(image[None], scale_factor=8 / max(image.shape[1:])) for image in images]
        batch = torch.zeros(len(small), 3, *(max(each.shape[side] for each in small) for side in (2, 3)))
        for number, each in enumerate(small):
            batch[number, :, : each.shape[2], : each.shape[3]] = each[0]
        y = self.conv(batch)
        y = self.seen(y.permute(0, 2, 3, 1) if self.turn else y)
        if self.training:
            assert targets is not None
            return {"box": y.square().mean(), "class": y.abs().mean()}
        return [{"boxes": torch.zeros(0, 4)} for _ in images]


def test_a_network_of_lists_and_losses_is_tapped_as_it_is() -> None:
    images = [torch.randn(3, 16, 16), torch.randn(3, 8, 8)]
    taps = Taps(Boxes(), ["seen"])
    found = taps(images, [1, 2])
    assert set(found.result) == {"box", "class"} and found.logits.shape == (2, 0)
    assert found.features[0].shape == (2, 4, 4, 4)
    sum(found.result.values()).backward()
    assert has_gradient(taps.get_parameter("model.conv.weight"))
    frozen = freeze(taps)(images)
    assert [set(boxes) for boxes in frozen.result] == [{"boxes"}] * 2 and not frozen.features[0].requires_grad
    seen = probe(Taps(Boxes(), ["seen"]), images)
    assert seen.channels == [4] and seen.num_classes == 0 and seen.classifier is None


def test_channels_last_of_a_network_of_lists_are_refused_without_a_word() -> None:
    images = [torch.randn(3, 16, 16), torch.randn(3, 8, 8)]
    with pytest.raises(ValueError, match="with its channels last: write seen@last"):
        Taps(Boxes(turn=True), ["seen"]).eval()(images)
    (found,) = Taps(Boxes(turn=True), ["seen@last"]).eval()(images).features
    assert found.shape == (2, 4, 4, 4)


def test_what_a_network_without_logits_returns_is_kept_only_there() -> None:
    images = torch.randn(2, 3, 6, 6)
    assert dry_forward(Taps(toy(), ["conv1"]), images).result is None
    with pytest.raises(TypeError, match="no logits are found"):
        Taps(Boxes()).eval()([image for image in images])  # without taps nothing could be learned from it
