"""Networks of Hugging Face's transformers, hf:NAME_OR_FOLDER: what their configuration, processor and weights say."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classification.data.preprocessing import MEAN, STD, Preprocessing, interpolation, square, three
from classification.errors import UserError
from classification.models.files import FORMAT
from classification.paths import is_file, is_folder
from mgd import logits_of

PREFIX = "hf:"
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
INSIDE = "network."  # in front of the names of the network's own tensors
# Code from a repository is never run; safetensors are taken where there are some.
SAFE: dict[str, Any] = {"trust_remote_code": False}


class Classifier(nn.Module):
    """Return the logits of a network of transformers as a tensor (B, K).

    Position embeddings are interpolated for images of another size than the network was built for.

    Args:
        network: an image classifier of transformers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        known = "interpolate_pos_encoding" in inspect.signature(network.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if known else {}

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.network(images, **self._options))


def from_huggingface(name: str, num_classes: int) -> nn.Module:
    """Build an image classifier of a configuration, with fresh weights.

    Args:
        name: a folder with config.json, or a name on the hub.
        num_classes: K.

    Raises:
        UserError: there is no such configuration, or none of an image classifier.
    """
    from transformers import AutoModelForImageClassification

    with _reading(name) as where:
        config = _config(where, num_labels=num_classes)
        return Classifier(AutoModelForImageClassification.from_config(config, **SAFE))


def read_huggingface(name: str) -> dict[str, Any]:
    """Return weights, class names and preprocessing of a folder or a name on the hub, as our checkpoints hold them.

    Tensors that the files lack are left out. Names that transformers makes up ("LABEL_0") are none.

    Raises:
        UserError: no such network or no weights, or images that it sees in a way that is not known here.
    """
    from transformers import AutoModelForImageClassification

    with _reading(name) as where:
        config = _config(where)
        network, said = AutoModelForImageClassification.from_pretrained(
            where, dtype=torch.float32, output_loading_info=True, local_files_only=is_folder(Path(where)), **SAFE
        )
    missing = set(said["missing_keys"])
    state = {INSIDE + key: value for key, value in network.state_dict().items() if key not in missing}
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    return {
        "format": FORMAT,
        "state_dict": state,
        "arch": PREFIX + name,
        "num_classes": config.num_labels,
        "classes": None if all(map(str.startswith, names, ["LABEL_"] * len(names))) else names,
        **preprocessing(name).describe(),
    }


def preprocessing(name: str) -> Preprocessing:
    """Return what the network's image processor does; without one, the size of its configuration and usual colours.

    Raises:
        UserError: no such network, or a processor that does what our preprocessing cannot.
    """
    from transformers import AutoImageProcessor

    with _reading(name) as where:
        config = _config(where)
        found = None
        with contextlib.suppress(OSError, ValueError):  # none was saved with the network
            found = AutoImageProcessor.from_pretrained(where, local_files_only=is_folder(Path(where)), **SAFE)
    if found is not None:
        try:
            return of_processor(found)
        except ValueError as error:
            raise UserError(f"{PREFIX}{name} sees images in a way that is not known here: its {error}") from error
    size = getattr(config, "image_size", None)
    return Preprocessing.of(size if isinstance(size, int) else 224)


def of_processor(processor: Any) -> Preprocessing:
    """Return what an image processor of transformers does to an image.

    With a the factor and b the offset of its first step, x = ((a * bytes - b) - mean) / std.

    Raises:
        ValueError: other than square images of red, green and blue.
    """
    if getattr(processor, "do_flip_channel_order", False):
        raise ValueError("processor turns red, green and blue around (do_flip_channel_order)")
    size, resize, crop = _sizes(processor)
    factor, offset = 255.0, 0.0
    if getattr(processor, "do_rescale", True):
        factor = 255 * float(getattr(processor, "rescale_factor", None) or 1 / 255)
        offset = float(bool(getattr(processor, "rescale_offset", False)))
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if getattr(processor, "do_normalize", True):
        mean, std = three(_given(processor.image_mean, MEAN), "mean"), three(_given(processor.image_std, STD), "std")
    again = std if getattr(processor, "include_top", False) else (1.0, 1.0, 1.0)  # EfficientNet divides twice
    resample = getattr(processor, "resample", None)
    return Preprocessing(
        size,
        resize,
        crop,
        interpolation(RESAMPLING.get(2 if resample is None else int(resample), "")),
        three([(m + offset) / factor for m in mean], "mean"),
        three([s * a / factor for s, a in zip(std, again, strict=True)], "std"),
    )


def _given(values: Any, usual: Any) -> Any:
    return usual if values is None else list(values) if isinstance(values, tuple) else values


def _sizes(processor: Any) -> tuple[int, int, str]:
    """Return side, resize and crop of a processor; see `Preprocessing`."""
    asked = {key: value for key, value in dict(processor.size or {}).items() if value is not None}
    short = asked.get("shortest_edge")
    side = int(short) if short is not None else square((asked.get("height"), asked.get("width")))
    how = "squash" if short is None else "center"
    if (share := getattr(processor, "crop_pct", None)) is not None and short is not None:  # as ConvNeXt
        return (side, math.floor(side / share), "center") if side < 384 else (side, side, "squash")
    if not getattr(processor, "do_center_crop", False):
        return side, side, how
    cropped = dict(processor.crop_size or {})
    size = square((cropped.get("height"), cropped.get("width")))
    return size, max(side, size), how


def _config(where: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(where, local_files_only=is_folder(Path(where)), **SAFE, **changes)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[str]:
    """Yield the folder or name to read from; what goes wrong becomes one sentence.

    Raises:
        UserError: transformers is not installed, or what was asked for is not there.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            f"{PREFIX}{name} needs transformers: `pip install transformers`, or the extra [huggingface] of this project"
        )
    where = str(Path(name).expanduser()) if name.startswith("~") else name
    folder = Path(where)
    if is_folder(folder) and not is_file(folder / "config.json"):
        raise UserError(f"{PREFIX}{name} is a folder without config.json: give one that save_pretrained() wrote")
    if not is_folder(folder) and (is_file(folder) or where.startswith((".", "/", "~")) or where.count("/") > 1):
        raise UserError(f"{PREFIX}{name} is not a folder: give one with config.json, or a name on the hub")
    with _quiet():
        try:
            yield where
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise UserError(f"{PREFIX}{name} {_cause(folder, error)}") from error


def _cause(folder: Path, error: Exception) -> str:
    """Say in a sentence why transformers cannot read a network."""
    text = " ".join(str(error).split())
    if "Unrecognized configuration class" in text:
        return "is no image classifier: transformers has no AutoModelForImageClassification of its configuration"
    if "trust_remote_code" in text:
        return "needs code of its own repository, which is never run: choose another network"
    if not is_folder(folder):
        return (
            "is neither a folder here nor in the cache of Hugging Face, and cannot be downloaded "
            f"({text[:160]}): give a folder with config.json and model.safetensors"
        )
    if isinstance(error, OSError) and "no file named" in text:
        return "holds no weights: give a folder with model.safetensors, or train from its configuration alone"
    return f"cannot be read: {text[:200]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing what becomes a message here, and from drawing bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
