"""What a network sees of an image: size, crop, interpolation and normalisation, as every checkpoint describes them."""

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
# Names of others, and what tensors can be resized by instead.
ALIKE = {"lanczos": "bicubic", "random": "bilinear", "": "bilinear"}

Three = tuple[float, float, float]
Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes what a network sees.

    Args:
        img_size: side of the square that the network sees, in pixels.
        resize: the short side, to which an image is resized before the centre is cropped, in pixels.
        crop: "center": resize the short side and keep the proportions; "squash": resize both sides to `resize`. Either
            way the square of `img_size` in the middle is kept.
        interpolation: "nearest", "bilinear" or "bicubic".
        mean: x = (bytes / 255 - mean) / std, channel by channel.
        std: likewise.

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
        for name, known in (("crop", CROPS), ("interpolation", INTERPOLATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {quoted(getattr(self, name))}")
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
        """Return that of a run: resize to img_size * 256/224 and crop; with the crop "pad", resize to img_size."""
        return cls(img_size, _resize(img_size, train_crop))

    def describe(self) -> dict[str, Any]:
        """Return plain values for a checkpoint, which `read` takes."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def at(self, img_size: int, train_crop: str | None = None) -> Preprocessing:
        """Return the same for a square of another size: by the rule of `train_crop`, or in the same proportion."""
        if train_crop is not None:
            return replace(self, img_size=img_size, resize=_resize(img_size, train_crop), crop="center")
        if self.resize == _resize(self.img_size, "resized"):  # exactly, where rounding would add up
            return replace(self, img_size=img_size, resize=_resize(img_size, "resized"))
        return replace(self, img_size=img_size, resize=max(img_size, round(img_size * self.resize / self.img_size)))

    def with_values(self, values: Mapping[str, Any]) -> Preprocessing:
        """Return the same with `values` of a file or a recipe in the place of its own; what they lack is kept.

        Raises:
            ValueError: values of another kind or range.
        """
        changes: dict[str, Any] = {}
        if values.get("img_size") is not None:
            changes["img_size"] = square(values["img_size"])
        changes |= {key: values[key] for key in ("resize", "crop", "interpolation") if values.get(key) is not None}
        for key in ("mean", "std"):
            if values.get(key) is not None:
                changes[key] = three(values[key], key)
        mean, std = (changes.get(key, (0, 0, 0)) for key in ("mean", "std"))
        if max(std) > 1 and (max(mean) > 1 or ("mean" in changes and not any(mean))):  # of bytes, as some code has them
            changes |= {key: tuple(value / 255 for value in changes[key]) for key in ("mean", "std")}
        if "img_size" in changes and "resize" not in changes:
            return replace(self.at(changes["img_size"]), **changes)
        return replace(self, **changes)

    def transform(self) -> Transform:
        """Return the evaluation transform, of (3, H, W) bytes to (3, img_size, img_size) bytes."""
        return Fit(self.img_size, self.resize, self.interpolation, squash=self.crop == "squash")

    def normalise(self, images: Tensor) -> Tensor:
        """Turn bytes (B, H, W, 3) into what the network sees: (B, 3, H, W) float32."""
        return normalise(images, self.mean, self.std)

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        how = f"of {self.resize}" if self.crop == "center" else f"of the whole image squashed to {self.resize}"
        return f"{self.img_size} px {how}, {self.interpolation}, mean {mean}, std {std}"


def _is_number(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _resize(img_size: int, train_crop: str) -> int:
    return img_size if train_crop == "pad" else round(img_size * 256 / 224)


def square(size: Any) -> int:
    """Return the side of a square that is written 224, (224, 224) or (3, 224, 224).

    Raises:
        ValueError: it is no such size.
    """
    size = _plain(size)
    size = int(size) if isinstance(size, float) and size.is_integer() else size
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    if isinstance(size, Sequence) and not isinstance(size, str) and 1 <= len(size) <= 3:
        sides = list(size)[1:] if len(size) == 3 else list(size)
        if all(type(side) is int for side in sides) and len(set(sides)) == 1:
            return int(sides[0])
    raise ValueError(f"img_size must be the side of a square in pixels, as 224 or (3, 224, 224); got {quoted(size)}")


def _plain(value: Any) -> Any:
    """Return what a tensor or array holds as numbers and lists, None where it is empty; other values as they are."""
    try:
        return value.tolist() if isinstance(value, (Tensor, np.ndarray, np.generic)) else value
    except (RuntimeError, NotImplementedError):  # a tensor without values
        return None


def three(values: Any, name: str) -> Three:
    """Return three floats; numbers in a tensor or a list, or one for all channels.

    Raises:
        ValueError: they are none.
    """
    plain = _plain(values.squeeze() if isinstance(values, (Tensor, np.ndarray)) else values)  # (3, 1, 1), too
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


def read(content: Mapping[str, Any], default: Preprocessing, source: str) -> Preprocessing:
    """Read the preprocessing that a checkpoint describes; what it does not say is that of `default`.

    Args:
        content: the checkpoint's dictionary.
        default: for the keys that it lacks, as checkpoints of earlier formats do.
        source: the file, for the message.

    Raises:
        UserError: values of another kind or range.
    """
    try:
        return default.with_values(content)
    except ValueError as error:
        raise UserError(f"{source} is damaged: its {error}") from error


def of_timm(cfg: Mapping[str, Any]) -> Preprocessing | None:
    """Return that of timm's `pretrained_cfg`; None where it says none that our square of three colours can have."""
    try:
        size = square(tuple(cfg["input_size"]))
        resize = max(size, math.floor(size / float(cfg.get("crop_pct") or 1)))
        return Preprocessing(
            size,
            resize,
            "squash" if cfg.get("crop_mode") == "squash" else "center",
            interpolation(cfg.get("interpolation") or ""),
            three(cfg["mean"], "mean"),
            three(cfg["std"], "std"),
        )
    except (KeyError, TypeError, ValueError):
        return None


def of_torchvision(transforms: Any, *, transform_input: bool = False) -> Preprocessing:
    """Return that of a torchvision weights' `transforms()`.

    Args:
        transforms: an `ImageClassification` preset.
        transform_input: whether torchvision's own network normalises once more, to mean and std 0.5.
    """
    mean, std = ((0.5, 0.5, 0.5),) * 2 if transform_input else (transforms.mean, transforms.std)
    size = int(transforms.crop_size[0])
    how = interpolation(transforms.interpolation.value)
    resize = max(size, int(transforms.resize_size[0]))
    return Preprocessing(size, resize, "center", how, three(mean, "mean"), three(std, "std"))


def interpolation(name: str) -> str:
    """Return our name of an interpolation, or of the one that is most alike."""
    return name if name in INTERPOLATIONS else ALIKE.get(name, "bilinear")


@lru_cache(maxsize=32)
def _row(values: tuple[float, ...], width: int, device: torch.device) -> Tensor:
    """Return the values for a whole row of pixels: a broadcast over the last three is slow on a processor.

    They are kept: to copy them for each batch would have a GPU waited for.
    """
    return 255 * torch.tensor(values, device=device).repeat(width)


def normalise(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Turn bytes (B, H, W, 3) into what networks see: (B, 3, H, W) float32, channels last in memory.

    x = (bytes / 255 - mean) / std
    """
    shift, scale = (_row(tuple(values), images.shape[2], images.device) for values in (mean, std))
    values: Tensor = images.flatten(2).float().sub_(shift).div_(scale).unflatten(2, (-1, 3))
    return values.permute(0, 3, 1, 2)
