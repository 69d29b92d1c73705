from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from classification.data.images import to_bytes
from classification.data.preprocessing import MEAN, STD, Preprocessing, normalise
from classification.data.transforms import train_transform, two_view_transform


def photo(height: int, width: int) -> Image.Image:
    """Smooth, as photographs are: neighbouring pixels are alike."""
    noise = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)
    return Image.fromarray((255 * smooth[0].permute(1, 2, 0)).byte().numpy())


def bytes_of(image: Image.Image) -> torch.Tensor:
    return to_bytes(image).permute(2, 0, 1)


@pytest.mark.parametrize("crop", ["resized", "pad"])
def test_evaluation_keeps_the_centre(crop: str) -> None:
    pixels = torch.zeros(3, 16, 16, dtype=torch.uint8)
    pixels[0, 8:] = 255
    image = Preprocessing.of(16, crop).transform()(pixels).int() - 100
    assert image.shape == (3, 16, 16)
    # Resize to 16 * 256/224 = 18 and cropping 16 leaves 16/18 of the picture, centred.
    assert (image[0, 8:] > 0).all() and (image[0, :7] < 0).all()
    assert (crop == "pad") == bool(torch.equal(image[0, 7], image[0, 0]))


@pytest.mark.parametrize("size", [(300, 400), (480, 231), (90, 90), (40, 1000)])
def test_evaluation_gives_the_pixels_of_torchvision(size: tuple[int, int]) -> None:
    image = photo(*size)
    expected = bytes_of(T.Compose([T.Resize(256), T.CenterCrop(224)])(image)).int()
    difference = (Preprocessing.of(224).transform()(bytes_of(image)).int() - expected).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.05  # rounding


@pytest.mark.parametrize("size", [(300, 400), (90, 90)])
def test_training_gives_the_crops_and_pixels_of_torchvision(size: tuple[int, int]) -> None:
    image = photo(*size)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = bytes_of(T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip()])(image)).int()
        torch.manual_seed(seed)
        difference = (train_transform(224, "resized")(bytes_of(image)).int() - expected).abs()
        assert difference.max() <= 1 and difference.float().mean() < 0.05


def test_a_padded_crop_shifts_and_mirrors() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, 16, 10] = 255
    places = set()
    for seed in range(200):
        torch.manual_seed(seed)
        rows, columns = torch.nonzero(train_transform(32, "pad")(image)[0]).T
        assert len(rows) == 1
        places.add((int(rows[0]), int(columns[0])))
    assert {row for row, _ in places} == set(range(12, 21))  # 16 -+ 4
    assert {column for _, column in places} == set(range(6, 15)) | set(range(17, 26))  # 10 -+ 4, and mirrored


def test_normalise_is_that_of_torchvision() -> None:
    image = photo(20, 30)
    expected = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])(image)
    got = normalise(torch.from_numpy(np.array(image))[None])
    torch.testing.assert_close(got[0], expected, atol=1e-5, rtol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_nothing_is_mirrored_where_that_is_switched_off() -> None:
    image = torch.arange(8, dtype=torch.uint8).expand(3, 8, 8).clone()  # rises from left to right
    for crop in ("resized", "pad"):
        for seed in range(20):
            torch.manual_seed(seed)
            row = train_transform(8, crop, hflip=False)(image)[0, 3].int()
            row = row[row > 0]  # black at the sides
            assert (row.diff() >= 0).all(), (crop, seed)


@pytest.mark.parametrize("size", [(300, 400), (20, 90), (64, 64)])
def test_images_of_another_size_are_made_to_fit_before_a_padded_crop(size: tuple[int, int]) -> None:
    image = photo(*size)
    expected = bytes_of(T.Compose([T.Resize(32), T.CenterCrop(32)])(image)).int()
    difference = (Preprocessing.of(32, "pad").transform()(bytes_of(image)).int() - expected).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.05
    torch.manual_seed(0)
    top, left = torch.randint(9, (2,)).tolist()
    torch.manual_seed(0)
    shifted = train_transform(32, "pad", hflip=False)(bytes_of(image)).int()
    padded = torch.nn.functional.pad(expected, [4] * 4)[:, top : top + 32, left : left + 32]
    assert (shifted - padded).abs().max() <= 1


def test_an_erased_rectangle_has_the_colour_that_the_network_sees_as_0() -> None:
    torch.manual_seed(0)
    image, mean = torch.full((3, 16, 16), 200, dtype=torch.uint8), (0.5, 0.25, 0.1)
    found = train_transform(16, "pad", hflip=False, erasing=1.0, mean=mean)(image)
    shifted = found[:, (found != 0).any(dim=0)]  # without the black border of the shift
    erased = shifted[:, (shifted[0] != 200)]
    assert erased.shape[1] > 4 and (erased == torch.tensor([[128], [64], [26]])).all()
    assert abs(float(normalise(erased[None, :, :, None].permute(0, 2, 3, 1), mean, STD).abs().max())) < 0.01


def test_randaugment_has_the_strength_that_is_asked_for() -> None:
    image = bytes_of(photo(32, 32))
    changed = {}
    for strength in (0, 30):
        changes = []
        for seed in range(20):
            torch.manual_seed(seed)
            plain = train_transform(32, "pad", hflip=False)(image).int()
            torch.manual_seed(seed)
            changes.append((train_transform(32, "pad", hflip=False, randaugment=strength)(image).int() - plain).abs())
        changed[strength] = float(torch.stack(changes).float().mean())
    assert 2 * changed[0] < changed[30]


@pytest.mark.parametrize("strong", [True, False])
@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_two_views_are_those_of_one_image_and_the_first_is_the_usual_one(crop: str, strong: bool) -> None:
    image = torch.arange(3 * 40 * 40).reshape(3, 40, 40).remainder(251).to(torch.uint8)
    torch.manual_seed(3)
    expected = train_transform(32, crop)(image)
    seconds = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        views = two_view_transform(32, crop, strong=strong)(image)
        assert views.shape == (2, 3, 32, 32) and views.dtype == torch.uint8
        assert torch.equal(views[0], expected) or seed == 4
        seconds.append(views[1])
    assert torch.equal(seconds[0], seconds[1]) and not torch.equal(seconds[0], seconds[2])
    assert not torch.equal(seconds[0], expected)


def test_a_strong_view_has_a_grey_square_of_half_the_side_at_most() -> None:
    image = torch.full((3, 32, 32), 7, dtype=torch.uint8)
    shares = []
    for seed in range(200):
        torch.manual_seed(seed)
        grey = (two_view_transform(32, "pad", hflip=False)(image)[1] == 128).all(dim=0)
        shares.append(float(grey.sum()) / 32**2)
    assert 0.26 > sorted(shares)[-5] > 0.1 and min(shares) == 0
