"""Random views of images that are stored as numbers: draw them once, and render them again from the numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from classification.data.draws import seeded_draws
from classification.data.resizing import Fit, random_box, resize
from classification.data.transforms import augmentations
from classification.errors import UserError
from classification.options.stored_teacher import ViewOptions

MAX_SIDE = 65535  # px, the longest side: boxes are stored in 16 bits
# One view. The box is a part of the image; with the crop "pad", of the image resized to the square and padded by an
# eighth of its side. `share` is the part of the image itself when it is mixed with its partner: by CutMix if the paste
# has a size, else by mixup.
VIEW = np.dtype(
    [
        *((name, np.uint16) for name in ("top", "left", "height", "width")),
        ("flip", np.bool_),
        ("colour_seed", np.uint32),
        ("partner", np.uint32),
        ("share", np.float16),
        *((f"paste_{name}", np.uint16) for name in ("top", "left", "height", "width")),
    ]
)
View = Any  # a scalar of `VIEW`


def draw_view(
    views: ViewOptions, seed: int, number: int, sample: int, size: tuple[int, int], num_images: int
) -> NDArray[Any]:
    """Draw a view of an image; the same arguments give the same view.

    Args:
        views: the options of all views.
        seed: of all draws.
        number: of the image.
        sample: number of the view.
        size: height and width of the image, in pixels.
        num_images: number of images among which its partner is drawn.

    Returns:
        A scalar array of `VIEW`.
    """
    view = np.zeros((), VIEW)
    with seeded_draws(seed, number, sample):
        if views.train_crop == "pad":
            top, left = torch.randint(2 * (views.img_size // 8) + 1, (2,)).tolist()
            box: tuple[int, ...] = (top, left, views.img_size, views.img_size)
        else:
            box = random_box(*size)
        for name, value in zip(("top", "left", "height", "width"), box, strict=True):
            view[name] = value
        view["flip"] = bool(views.hflip) and float(torch.rand(1)) < 0.5
        view["colour_seed"] = int(torch.randint(2**32, (1,))) if views.changes_colours else 0
    view["partner"], view["share"] = number, 1
    if views.mixes and num_images > 1:
        _draw_partner(view, views, np.random.default_rng([seed, number, sample]), number, num_images)
    return view


def _draw_partner(
    view: NDArray[Any], views: ViewOptions, rng: np.random.Generator, number: int, num_images: int
) -> None:
    """Draw the partner of an image, and how they are mixed; with both mixup and CutMix, one of the two is drawn.

    CutMix pastes a rectangle with the part 1 - lambda of the area, centred at a random point and clipped to the view.
    """
    view["partner"] = (number + 1 + rng.integers(num_images - 1)) % num_images
    paste = bool(views.cutmix) and (not views.mixup or rng.random() < 0.5)
    alpha = views.cutmix if paste else views.mixup
    share = rng.beta(alpha, alpha)
    if paste:
        side, half = views.img_size, int(0.5 * math.sqrt(1 - share) * views.img_size)
        row, column = rng.integers(side, size=2)
        top, left = max(row - half, 0), max(column - half, 0)
        height, width = min(row + half, side) - top, min(column + half, side) - left
        for name, value in zip(("top", "left", "height", "width"), (top, left, height, width), strict=True):
            view[f"paste_{name}"] = value
        share = 1 - height * width / side**2
    view["share"] = share


class Renderer:
    """Render views from their numbers.

    Args:
        views: the options with which they were drawn.
    """

    def __init__(self, views: ViewOptions) -> None:
        self.views = views
        self._fit = Fit(views.img_size)
        self._changes = nn.Sequential(*augmentations(views.randaugment, views.random_erasing, views.mean))

    def __call__(self, image: Tensor, view: View, name: str) -> Tensor:
        """Render a view of an image, before it is mixed: (3, H, W) bytes -> (3, S, S) bytes.

        Args:
            image: the decoded image.
            view: a scalar of `VIEW`.
            name: of the image, for the message.

        Raises:
            UserError: the box is not inside the image.
        """
        top, left, height, width = (int(view[key]) for key in ("top", "left", "height", "width"))
        padded = self.views.train_crop == "pad"
        padded_image = F.pad(self._fit(image), [self.views.img_size // 8] * 4) if padded else image
        if not (0 < height <= padded_image.shape[1] - top and 0 < width <= padded_image.shape[2] - left):
            raise UserError(f"{name} is smaller than when it was stored: store the teacher again with mgd reinforce")
        part = padded_image[:, top : top + height, left : left + width]
        rendered = part if padded else resize(part, (self.views.img_size,) * 2)
        rendered = rendered.flip(2) if view["flip"] else rendered
        if not len(self._changes):
            return rendered
        with seeded_draws(int(view["colour_seed"])):
            changed: Tensor = self._changes(rendered)
        return changed


def mix_views(image: Tensor, partner: Tensor, view: View) -> Tensor:
    """Mix two views (3, S, S) of bytes: share * image + (1 - share) * partner, or paste a rectangle of the partner."""
    top, left, height, width = (int(view[f"paste_{key}"]) for key in ("top", "left", "height", "width"))
    if height and width:
        result = image.clone()
        result[:, top : top + height, left : left + width] = partner[:, top : top + height, left : left + width]
        return result
    share = float(view["share"])
    return image if share == 1 else (share * image + (1 - share) * partner).round().to(torch.uint8)
