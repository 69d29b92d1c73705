"""Views of images that are written down: drawn once, and made again from the numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from classification.data.draws import drawing_from
from classification.data.resizing import Fit, random_box, resize
from classification.data.transforms import changes
from classification.errors import UserError
from classification.options.stored_teacher import ViewOptions

LONGEST = 65535  # px of a side: boxes are kept in 16 bits
# One view. The box lies in the image, or with the crop "pad" in the image that was fitted to the square and padded by
# an eighth of its side. `share` is the part of the image itself beside its partner; a paste that has a size is CutMix.
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


def draw(
    views: ViewOptions, seed: int, number: int, sample: int, size: tuple[int, int], num_images: int
) -> NDArray[Any]:
    """Draw a view of an image.

    Args:
        views: how.
        seed: of all draws.
        number: of the image.
        sample: which view of it.
        size: its height and width, in pixels.
        num_images: among which its partner is drawn.

    Returns:
        A scalar array of `VIEW`; the same for the same arguments.
    """
    found = np.zeros((), VIEW)
    with drawing_from(seed, number, sample):
        if views.train_crop == "pad":
            top, left = torch.randint(2 * (views.img_size // 8) + 1, (2,)).tolist()
            box: tuple[int, ...] = (top, left, views.img_size, views.img_size)
        else:
            box = random_box(*size)
        for name, value in zip(("top", "left", "height", "width"), box, strict=True):
            found[name] = value
        found["flip"] = bool(views.hflip) and float(torch.rand(1)) < 0.5
        found["colour_seed"] = int(torch.randint(2**32, (1,))) if views.changes_colours else 0
    found["partner"], found["share"] = number, 1
    if views.mixes and num_images > 1:
        _mix(found, views, np.random.default_rng([seed, number, sample]), number, num_images)
    return found


def _mix(found: NDArray[Any], views: ViewOptions, rng: np.random.Generator, number: int, num_images: int) -> None:
    """Draw the partner of an image, and how both are mixed; where mixup and CutMix are both asked for, a coin decides.

    CutMix pastes a rectangle with the part 1 - lambda of the area around a point of the view, and clips it.
    """
    found["partner"] = (number + 1 + rng.integers(num_images - 1)) % num_images
    paste = bool(views.cutmix) and (not views.mixup or rng.random() < 0.5)
    alpha = views.cutmix if paste else views.mixup
    share = rng.beta(alpha, alpha)
    if paste:
        side, half = views.img_size, int(0.5 * math.sqrt(1 - share) * views.img_size)
        row, column = rng.integers(side, size=2)
        top, left = max(row - half, 0), max(column - half, 0)
        height, width = min(row + half, side) - top, min(column + half, side) - left
        for name, value in zip(("top", "left", "height", "width"), (top, left, height, width), strict=True):
            found[f"paste_{name}"] = value
        share = 1 - height * width / side**2
    found["share"] = share


class Renderer:
    """Make views of their numbers.

    Args:
        views: how they were drawn.
    """

    def __init__(self, views: ViewOptions) -> None:
        self.views = views
        self._fit = Fit(views.img_size)
        self._changes = nn.Sequential(*changes(views.randaugment, views.random_erasing, views.mean))

    def __call__(self, image: Tensor, view: View, name: str) -> Tensor:
        """Return a view of an image alone, before it is mixed: (3, H, W) bytes to (3, S, S).

        Args:
            image: the decoded image.
            view: a scalar of `VIEW`.
            name: of the image, for the message.

        Raises:
            UserError: the box does not lie in the image.
        """
        top, left, height, width = (int(view[key]) for key in ("top", "left", "height", "width"))
        padded = self.views.train_crop == "pad"
        wide = F.pad(self._fit(image), [self.views.img_size // 8] * 4) if padded else image
        if not (0 < height <= wide.shape[1] - top and 0 < width <= wide.shape[2] - left):
            raise UserError(f"{name} is smaller than when it was stored: store the teacher again with mgd reinforce")
        part = wide[:, top : top + height, left : left + width]
        made = part if padded else resize(part, (self.views.img_size,) * 2)
        made = made.flip(2) if view["flip"] else made
        if not len(self._changes):
            return made
        with drawing_from(int(view["colour_seed"])):
            changed: Tensor = self._changes(made)
        return changed


def mixed(image: Tensor, partner: Tensor, view: View) -> Tensor:
    """Return two views (3, S, S) of bytes as one: share * image + (1 - share) * partner, or with a part pasted in."""
    top, left, height, width = (int(view[f"paste_{key}"]) for key in ("top", "left", "height", "width"))
    if height and width:
        found = image.clone()
        found[:, top : top + height, left : left + width] = partner[:, top : top + height, left : left + width]
        return found
    share = float(view["share"])
    return image if share == 1 else (share * image + (1 - share) * partner).round().to(torch.uint8)
