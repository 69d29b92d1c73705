"""Preprocessing of images: size, crop, interpolation and normalisation, as every checkpoint describes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classification.data.resizing import Fit
from classification.errors import UserError, quoted
from classification.options.names import LARGEST_SIZE

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
CROPS = ("center", "squash")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
# Interpolations that PyTorch does not have for tensors, and the nearest that it has.
NEAREST_INTERPOLATION = {"lanczos": "bicubic", "random": "bilinear", "": "bilinear"}

Three = tuple[float, float, float]
Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """How an image is turned into the input of a network.

    Args:
        img_size: side of the square input, in pixels.
        resize: size of the image before the central square of `img_size` is cut out, in pixels.
        crop: "center": resize the short side to `resize` and keep the proportions; "squash": resize both sides.
        interpolation: "nearest", "bilinear" or "bicubic".
        mean: per channel, of x = (bytes / 255 - mean) / std.
        std: per channel, likewise.

    Raises:
        ValueError: values of another kind or range.
    """

    img_size: int = 224
    resize: int = 256
    crop: str = "center"
    interpolation: str = "bilinear"
    mean: Three = MEAN
    std: Three = STD

    def __post_init__(self) -> None:
        for name in ("img_size", "resize"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
                raise ValueError(f"{name} must be a number of pixels, {LARGEST_SIZE} at most; got {quoted(value)}")
        if self.resize < self.img_size:
            raise ValueError(f"resize must be at least img_size, {self.img_size}; got {self.resize}")
        for name, allowed in (("crop", CROPS), ("interpolation", INTERPOLATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {quoted(getattr(self, name))}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if type(values) is not tuple or len(values) != 3 or not all(map(_is_number, values)):
                raise ValueError(f"{name} must be three numbers; got {quoted(values)}")
        if not (min(self.mean) >= 0 and max(self.mean) <= 1 and min(self.std) > 0 and max(self.std) <= 1):
            raise ValueError(
                f"mean and std must be those of values between 0 and 1; got {quoted(self.mean)} and {quoted(self.std)}"
            )

    @classmethod
    def of(cls, img_size: int, train_crop: str = "resized") -> Preprocessing:
        """Return the default for training: resize to img_size * 256/224, or with the crop "pad", to img_size."""
        return cls(img_size, _default_resize(img_size, train_crop))

    def describe(self) -> dict[str, Any]:
        """Return plain values for a checkpoint, as `read_preprocessing` takes them."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def at(self, img_size: int, train_crop: str | None = None) -> Preprocessing:
        """Return the preprocessing for another size: by the default for `train_crop`, or in the same proportion."""
        if train_crop is not None:
            return replace(self, img_size=img_size, resize=_default_resize(img_size, train_crop), crop="center")
        if self.resize == _default_resize(self.img_size, "resized"):  # exactly, as rounding errors would add up
            return replace(self, img_size=img_size, resize=_default_resize(img_size, "resized"))
        return replace(self, img_size=img_size, resize=max(img_size, round(img_size * self.resize / self.img_size)))

    def with_values(self, values: Mapping[str, Any]) -> Preprocessing:
        """Return a copy with some values replaced by those of a file or a recipe.

        Raises:
            ValueError: values of another kind or range.
        """
        changes: dict[str, Any] = {}
        if values.get("img_size") is not None:
            changes["img_size"] = square_side(values["img_size"])
        changes |= {key: values[key] for key in ("resize", "crop", "interpolation") if values.get(key) is not None}
        for key in ("mean", "std"):
            if values.get(key) is not None:
                changes[key] = three_numbers(values[key], key)
        mean, std = (changes.get(key, (0, 0, 0)) for key in ("mean", "std"))
        # Some code gives mean and std of bytes, not of values between 0 and 1.
        if max(std) > 1 and (max(mean) > 1 or ("mean" in changes and not any(mean))):
            changes |= {key: tuple(value / 255 for value in changes[key]) for key in ("mean", "std")}
        if "img_size" in changes and "resize" not in changes:
            return replace(self.at(changes["img_size"]), **changes)
        return replace(self, **changes)

    def transform(self) -> Transform:
        """Return the transform for evaluation: (3, H, W) bytes -> (3, img_size, img_size) bytes."""
        return Fit(self.img_size, self.resize, self.interpolation, squash=self.crop == "squash")

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise bytes (B, H, W, 3) to (B, 3, H, W) float32."""
        return normalise(images, self.mean, self.std)

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        how = f"of {self.resize}" if self.crop == "center" else f"of the whole image squashed to {self.resize}"
        return f"{self.img_size} px {how}, {self.interpolation}, mean {mean}, std {std}"


def _is_number(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _default_resize(img_size: int, train_crop: str) -> int:
    return img_size if train_crop == "pad" else round(img_size * 256 / 224)


def square_side(size: Any) -> int:
    """Return the side of a square, given as 224, (224, 224) or (3, 224, 224).

    Raises:
        ValueError: the value has another form.
    """
    size = _to_plain(size)
    size = int(size) if isinstance(size, float) and size.is_integer() else size
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    if isinstance(size, Sequence) and not isinstance(size, str) and 1 <= len(size) <= 3:
        sides = list(size)[1:] if len(size) == 3 else list(size)
        if all(type(side) is int for side in sides) and len(set(sides)) == 1:
            return int(sides[0])
    raise ValueError(f"img_size must be the side of a square in pixels, as 224 or (3, 224, 224); got {quoted(size)}")


def _to_plain(value: Any) -> Any:
    """Return a tensor or array as a number or list, None if it is a tensor without values; other values as they are."""
    try:
        return value.tolist() if isinstance(value, (Tensor, np.ndarray, np.generic)) else value
    except (RuntimeError, NotImplementedError):  # a tensor without values
        return None


def three_numbers(values: Any, name: str) -> Three:
    """Return three floats; numbers in a tensor or a list, or one for all channels.

    Raises:
        ValueError: they are none.
    """
    plain = _to_plain(values.squeeze() if isinstance(values, (Tensor, np.ndarray)) else values)  # (3, 1, 1), too
    one = plain[0] if isinstance(plain, (list, tuple)) and len(plain) == 1 else plain
    listed = [one] * 3 if isinstance(one, (int, float)) else plain
    if (
        not isinstance(listed, Sequence)
        or len(listed) != 3
        or not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in listed)
    ):
        raise ValueError(f"{name} must be three numbers; got {quoted(values)}")
    first, second, third = map(float, listed)
    return first, second, third


def read_preprocessing(content: Mapping[str, Any], default: Preprocessing, source: str) -> Preprocessing:
    """Read the preprocessing that a checkpoint describes.

    Args:
        content: the checkpoint's dictionary.
        default: values for keys that are missing, as in checkpoints of earlier formats.
        source: the file, for the message.

    Raises:
        UserError: values of another kind or range.
    """
    try:
        return default.with_values(content)
    except ValueError as error:
        raise UserError(f"{source} is damaged: its {error}") from error


def of_timm(cfg: Mapping[str, Any]) -> Preprocessing | None:
    """Return the preprocessing of timm's `pretrained_cfg`; None if it is missing, or not of square RGB images."""
    try:
        size = square_side(tuple(cfg["input_size"]))
        resize = max(size, math.floor(size / float(cfg.get("crop_pct") or 1)))
        return Preprocessing(
            size,
            resize,
            "squash" if cfg.get("crop_mode") == "squash" else "center",
            supported_interpolation(cfg.get("interpolation") or ""),
            three_numbers(cfg["mean"], "mean"),
            three_numbers(cfg["std"], "std"),
        )
    except (KeyError, TypeError, ValueError):
        return None


def of_torchvision(transforms: Any, *, transform_input: bool = False) -> Preprocessing:
    """Return the preprocessing of the `transforms()` of torchvision's weights.

    Args:
        transforms: an `ImageClassification` preset.
        transform_input: whether torchvision's network normalises its input again, to mean and std 0.5.
    """
    mean, std = ((0.5, 0.5, 0.5),) * 2 if transform_input else (transforms.mean, transforms.std)
    size = int(transforms.crop_size[0])
    how = supported_interpolation(transforms.interpolation.value)
    resize = max(size, int(transforms.resize_size[0]))
    return Preprocessing(size, resize, "center", how, three_numbers(mean, "mean"), three_numbers(std, "std"))


def supported_interpolation(name: str) -> str:
    """Return an interpolation of `INTERPOLATIONS`: the one of this name, or the nearest to it."""
    return name if name in INTERPOLATIONS else NEAREST_INTERPOLATION.get(name, "bilinear")


@lru_cache(maxsize=32)
def _row_of_values(values: tuple[float, ...], width: int, device: torch.device) -> Tensor:
    """Return 255 times the values, repeated for a row of pixels: broadcasting over three channels is slow on a CPU.

    The result is cached, because copying it to a GPU for each batch would wait for the GPU.
    """
    return 255 * torch.tensor(values, device=device).repeat(width)


def normalise(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Normalise bytes (B, H, W, 3) to (B, 3, H, W) float32, channels last in memory.

    x = (bytes / 255 - mean) / std
    """
    shift, scale = (_row_of_values(tuple(values), images.shape[2], images.device) for values in (mean, std))
    values: Tensor = images.flatten(2).float().sub_(shift).div_(scale).unflatten(2, (-1, 3))
    return values.permute(0, 3, 1, 2)
