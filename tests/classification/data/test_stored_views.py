"""Views that are drawn once and made again from their numbers, against torchvision's own functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from classification.data.stored_views import VIEW, Renderer, draw_view, mix_views
from classification.errors import UserError
from classification.options.stored_teacher import ViewOptions

tv: Any = functional
PLAIN = ViewOptions(16, "resized", 1, None, 0.0, 0.0, 0.0, (0.485, 0.456, 0.406))
SIZE = (30, 41)


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *SIZE), dtype=np.uint8))


def drawn(views: ViewOptions, sample: int, number: int = 3) -> Any:
    return draw_view(views, 0, number, sample, SIZE, 50)


def test_the_same_numbers_give_the_same_view() -> None:
    torch.manual_seed(1)
    first, state = drawn(PLAIN, 4), torch.get_rng_state()
    torch.manual_seed(2)
    assert drawn(PLAIN, 4) == first and drawn(PLAIN, 5) != first and drawn(PLAIN, 4, number=2) != first
    torch.manual_seed(1)
    drawn(PLAIN, 4)
    assert torch.equal(torch.get_rng_state(), state) and torch.initial_seed() == 1  # what is drawn outside goes on


def test_a_view_is_the_crop_and_mirror_that_its_numbers_say(image: Tensor) -> None:
    flips = 0
    for sample in range(40):
        view = drawn(PLAIN, sample)
        box = [int(view[name]) for name in ("top", "left", "height", "width")]
        want = tv.resized_crop(image, *box, [16, 16], antialias=True)
        want = tv.horizontal_flip(want) if view["flip"] else want
        assert torch.equal(Renderer(PLAIN)(image, view, "x.png"), want)
        flips += int(view["flip"])
        assert view["partner"] == 3 and view["share"] == 1 and view["colour_seed"] == 0
    assert 10 < flips < 30
    assert not any(drawn(replace(PLAIN, hflip=0), sample)["flip"] for sample in range(20))


def test_the_crop_pad_shifts_by_an_eighth(image: Tensor) -> None:
    views = replace(PLAIN, train_crop="pad", hflip=0)
    fitted = tv.center_crop(tv.resize(image, 16, antialias=True), 16)
    wide = tv.pad(fitted, [2, 2, 2, 2])
    tops = set()
    for sample in range(30):
        view = drawn(views, sample)
        top, left = int(view["top"]), int(view["left"])
        assert torch.equal(Renderer(views)(image, view, ""), wide[:, top : top + 16, left : left + 16])
        tops.add(top)
    assert tops == {0, 1, 2, 3, 4}


def test_colours_are_those_of_the_stored_seed(image: Tensor) -> None:
    views = replace(PLAIN, randaugment=9, random_erasing=1.0)
    view, fill = drawn(views, 0), [124, 116, 104]
    box = [int(view[name]) for name in ("top", "left", "height", "width")]
    plain = tv.resized_crop(image, *box, [16, 16], antialias=True)
    plain = tv.horizontal_flip(plain) if view["flip"] else plain
    render = Renderer(views)
    first = render(image, view, "")
    torch.manual_seed(7)
    assert torch.equal(render(image, view, ""), first) and not torch.equal(first, plain)
    changed: list[Any] = [
        v2.RandAugment(magnitude=9, interpolation=v2.InterpolationMode.BILINEAR, fill=fill),
        v2.RandomErasing(1.0, value=fill),  # type: ignore[arg-type]
    ]
    seed = int(np.random.SeedSequence((int(view["colour_seed"]),)).generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.manual_seed(seed)
    assert torch.equal(first, v2.Compose(changed)(plain))


def test_pairs_are_mixed_as_their_numbers_say() -> None:
    one, two = torch.full((3, 16, 16), 200, dtype=torch.uint8), torch.zeros(3, 16, 16, dtype=torch.uint8)
    kinds, partners = set(), set()
    for sample in range(60):
        view = drawn(replace(PLAIN, mixup=0.4, cutmix=1.0), sample)
        partners.add(int(view["partner"]))
        found, share = mix_views(one, two, view), float(view["share"])
        area = int(view["paste_height"]) * int(view["paste_width"])
        kinds.add(bool(area))
        if area:
            assert int((found == 0).all(0).sum()) == area and share == pytest.approx(1 - area / 256, abs=1e-3)
        else:
            assert bool((found == found[0, 0, 0]).all()) and int(found[0, 0, 0]) == pytest.approx(200 * share, abs=0.6)
    assert kinds == {True, False} and 3 not in partners and partners <= set(range(50)) and len(partners) > 20


def test_an_image_that_shrank_is_refused(image: Tensor) -> None:
    view = np.zeros((), VIEW)
    view["height"], view["width"], view["left"] = 30, 30, 20
    with pytest.raises(UserError, match=r"a\.png is smaller than when it was stored"):
        Renderer(PLAIN)(image, view, "a.png")
