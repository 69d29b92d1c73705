"""Networks of Hugging Face's transformers, hf:NAME_OR_FOLDER: configuration, preprocessing and weights."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classification.data.preprocessing import (
    MEAN,
    STD,
    Preprocessing,
    square_side,
    supported_interpolation,
    three_numbers,
)
from classification.errors import UserError
from classification.paths import is_file, is_folder
from classification.system.weight_files import FORMAT
from mgd import logits_of

PREFIX = "hf:"
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
TENSOR_PREFIX = "network."  # prefix of the names of the network's own tensors
CONFIG, PROCESSORS = "config.json", ("preprocessor_config.json", "processor_config.json")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # in order of preference
LOCAL_ONLY: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}  # never run code of a repository


class Classifier(nn.Module):
    """A network of transformers that returns its logits as a tensor (B, K).

    For images of another size than the network was built for, position embeddings are interpolated.

    Args:
        network: an image classifier of transformers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        interpolates = "interpolate_pos_encoding" in inspect.signature(network.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if interpolates else {}

    def configuration(self) -> dict[str, Any]:
        """Return the configuration for a checkpoint, so that it can be loaded without the original folder."""
        config: Any = self.network.config
        values: dict[str, Any] = json.loads(config.to_json_string())
        return values

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.network(images, **self._options))


def from_huggingface(name: str, num_classes: int, configuration: Mapping[str, Any] | None = None) -> nn.Module:
    """Build an image classifier with fresh weights.

    Args:
        name: a folder with config.json, or a name on the hub.
        num_classes: K.
        configuration: of a checkpoint, in place of config.json.

    Raises:
        UserError: there is no such configuration, or it is not of an image classifier.
    """
    folder = None if configuration else _folder(name, weights=False)
    with _as_user_error(name):
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageClassification

        if configuration:
            config = CONFIG_MAPPING[configuration["model_type"]].from_dict(dict(configuration))
        else:
            config = AutoConfig.from_pretrained(str(folder), **LOCAL_ONLY)
        if config.num_labels != num_classes:
            config.num_labels = num_classes
        return Classifier(AutoModelForImageClassification.from_config(config, trust_remote_code=False))


def read_huggingface(name: str) -> dict[str, Any]:
    """Return weights, class names and preprocessing of a folder or a name on the hub, in the form of a checkpoint.

    Tensors that are missing in the files are left out. Default class names ("LABEL_0") count as no names.

    Raises:
        UserError: there is no such network, it has no weights, or its preprocessing is not supported.
    """
    folder = _folder(name, weights=True)
    with _as_user_error(name):
        from transformers import AutoModelForImageClassification

        network, loading_info = AutoModelForImageClassification.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **LOCAL_ONLY
        )
    missing, config = set(loading_info["missing_keys"]), network.config
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    return {
        "format": FORMAT,
        "state_dict": {TENSOR_PREFIX + key: value for key, value in network.state_dict().items() if key not in missing},
        "arch": PREFIX + name,
        "num_classes": config.num_labels,
        "classes": None if all(label.startswith("LABEL_") for label in names) else names,
        "configuration": Classifier(network).configuration(),
        **preprocessing(name).describe(),
    }


def preprocessing(name: str) -> Preprocessing:
    """Return the preprocessing of a network's image processor; without one, the default for the network's size.

    Raises:
        UserError: there is no such network, or its preprocessing is not supported.
    """
    folder = _folder(name, weights=False)
    with _as_user_error(name):
        from transformers import AutoConfig, AutoImageProcessor

        if not any(is_file(folder / file) for file in PROCESSORS):
            config = AutoConfig.from_pretrained(folder, **LOCAL_ONLY)
            size = getattr(getattr(config, "vision_config", config), "image_size", None)
            return Preprocessing.of(size if isinstance(size, int) else 224)
        processor = AutoImageProcessor.from_pretrained(folder, **LOCAL_ONLY)
    try:
        return of_processor(processor)
    except (ValueError, TypeError, ArithmeticError) as error:  # the last two for values of a wrong type, or 0
        raise UserError(
            f"{PREFIX}{name} prepares images in a way that is not supported ({error}): choose another network"
        ) from error


def of_processor(processor: Any) -> Preprocessing:
    """Return the preprocessing of an image processor of transformers.

    The processor computes x = ((a * bytes - b) - mean) / std, with its rescale factor a and offset b.

    Raises:
        ValueError: the images are not square or not RGB.
    """
    if getattr(processor, "do_flip_channel_order", False):
        raise ValueError("processor reverses the order of red, green and blue (do_flip_channel_order)")
    size, resize, crop = _sizes(processor)
    factor, offset = 255.0, 0.0
    if getattr(processor, "do_rescale", True):
        factor = 255 * float(getattr(processor, "rescale_factor", None) or 1 / 255)
        offset = float(bool(getattr(processor, "rescale_offset", False)))
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if getattr(processor, "do_normalize", True):
        mean, std = (
            three_numbers(_list_or_default(processor.image_mean, MEAN), "mean"),
            three_numbers(_list_or_default(processor.image_std, STD), "std"),
        )
    again = std if getattr(processor, "include_top", False) else (1.0, 1.0, 1.0)  # EfficientNet divides twice
    resample = getattr(processor, "resample", None)
    return Preprocessing(
        size,
        resize,
        crop,
        supported_interpolation(RESAMPLING.get(2 if resample is None else int(resample), "")),
        three_numbers([(m + offset) / factor for m in mean], "mean"),
        three_numbers([s * a / factor for s, a in zip(std, again, strict=True)], "std"),
    )


def _list_or_default(values: Any, default: Any) -> Any:
    return default if values is None else list(values) if isinstance(values, tuple) else values


def _sizes(processor: Any) -> tuple[int, int, str]:
    """Return img_size, resize and crop of a processor; see `Preprocessing`."""
    size_options = {key: value for key, value in dict(processor.size or {}).items() if value is not None}
    short = size_options.get("shortest_edge")
    side = int(short) if short is not None else square_side((size_options.get("height"), size_options.get("width")))
    crop = "squash" if short is None else "center"
    if (share := getattr(processor, "crop_pct", None)) is not None and short is not None:  # as ConvNeXt
        return (side, math.floor(side / share), "center") if side < 384 else (side, side, "squash")
    if not getattr(processor, "do_center_crop", False):
        return side, side, crop
    crop_size = dict(processor.crop_size or {})
    size = square_side((crop_size.get("height"), crop_size.get("width")))
    return size, max(side, size), crop


def folder_of(path: Path) -> Path | None:
    """Return the folder of a weight file that transformers wrote; None for other files."""
    if path.name not in ("model.safetensors", "pytorch_model.bin") or not is_file(path):
        return None
    try:
        config = json.loads((path.parent / CONFIG).read_bytes())
    except (OSError, ValueError):
        return None
    return path.parent if isinstance(config, dict) and "model_type" in config else None


def _folder(name: str, *, weights: bool) -> Path:
    """Return the folder of a network: `name` itself, or a folder of the cache, downloading it if necessary.

    Raises:
        UserError: transformers is not installed, or there is no such network.
    """
    full_name = f"{PREFIX}{name}"
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            f"{full_name} needs transformers: `pip install transformers`, or the extra [huggingface] of this project"
        )
    path = Path(name).expanduser()
    if is_folder(path):
        if not is_file(path / CONFIG):
            raise UserError(f"{full_name} is a folder without {CONFIG}: give one that save_pretrained() wrote")
        if weights and not _is_complete(path, weights=True):
            raise UserError(
                f"{full_name} holds no weights: give a folder with model.safetensors, or, for a student, leave out "
                "--pretrained"
            )
        return path
    if is_file(path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{full_name} is not a folder: give one with {CONFIG}, or a name on the hub")
    return _from_hub(name, weights=weights)


def _from_hub(name: str, *, weights: bool) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    full_name = f"{PREFIX}{name}"
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            cached = Path(hub.snapshot_download(name, local_files_only=True))
            if _is_complete(cached, weights=weights):
                return cached
        listed = hub.HfApi().model_info(name, timeout=10).siblings or []  # fails fast, as a download would be retried
        patterns = _files_to_download([file.rfilename for file in listed], weights=weights)
        folder = Path(hub.snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(
            f"{full_name} needs permission from its authors: ask for it on the hub, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{full_name} is not a folder here, and the hub has no network of this name") from error
    except Exception as error:  # errors of the network have no common class
        raise UserError(
            f"{full_name} is neither a folder here nor in the cache of Hugging Face, and cannot be downloaded "
            f"({type(error).__name__}): give a folder with {CONFIG} and model.safetensors"
        ) from error
    if not _is_complete(folder, weights=weights):
        raise UserError(
            f"{full_name} has no {'weights' if is_file(folder / CONFIG) else CONFIG} on the hub: name another"
        )
    return folder


def _is_complete(folder: Path, *, weights: bool) -> bool:
    has_weights = any(next(folder.glob(pattern), None) for pattern in WEIGHTS)
    return is_file(folder / CONFIG) and (has_weights or not weights)


def _files_to_download(files: Sequence[str], *, weights: bool) -> list[str]:
    """Return the files to download: all JSON files, and weights in one format."""
    described = [file for file in files if "/" not in file and file.endswith(".json")]
    for pattern in WEIGHTS if weights else ():
        if matching := fnmatch.filter([file for file in files if "/" not in file], pattern):
            return described + matching
    return described


@contextlib.contextmanager
def _as_user_error(name: str) -> Iterator[None]:
    """Silence transformers, and turn any of its errors into one sentence.

    Raises:
        UserError: an error was raised; the message names the network.
    """
    with _silenced():
        try:
            yield
        except Exception as error:  # broken files may raise anything
            raise UserError(f"{PREFIX}{name} {_describe_error(error)}") from error


def _describe_error(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "Unrecognized configuration class" in text:
        return "is no image classifier: transformers has no AutoModelForImageClassification of its configuration"
    if "trust_remote_code" in text or "custom code" in text:
        return "needs code of its own repository, which is never run: choose another network"
    return f"cannot be read: {text[:200]}"


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keep transformers from logging errors, which become messages here, and from drawing progress bars."""
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
