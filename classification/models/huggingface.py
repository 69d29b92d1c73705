"""Networks of Hugging Face's transformers, hf:NAME_OR_FOLDER: what their configuration, processor and weights say."""

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
INSIDE = "network."  # in front of the names of the network's own tensors
CONFIG, PROCESSORS = "config.json", ("preprocessor_config.json", "processor_config.json")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # the first where there are both
SAFE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}  # code of a repository is never run


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

    def configuration(self) -> dict[str, Any]:
        """Return what the network is built from, for a checkpoint that must not need the folder that it came from."""
        config: Any = self.network.config
        found: dict[str, Any] = json.loads(config.to_json_string())
        return found

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.network(images, **self._options))


def from_huggingface(name: str, num_classes: int, configuration: Mapping[str, Any] | None = None) -> nn.Module:
    """Build an image classifier with fresh weights.

    Args:
        name: a folder with config.json, or a name on the hub.
        num_classes: K.
        configuration: of a checkpoint, in place of config.json.

    Raises:
        UserError: there is no such configuration, or none of an image classifier.
    """
    folder = None if configuration else _folder(name, weights=False)
    with _one_sentence(name):
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageClassification

        if configuration:
            config = CONFIG_MAPPING[configuration["model_type"]].from_dict(dict(configuration))
        else:
            config = AutoConfig.from_pretrained(str(folder), **SAFE)
        if config.num_labels != num_classes:
            config.num_labels = num_classes
        return Classifier(AutoModelForImageClassification.from_config(config, trust_remote_code=False))


def read_huggingface(name: str) -> dict[str, Any]:
    """Return weights, class names and preprocessing of a folder or a name on the hub, as our checkpoints hold them.

    Tensors that the files lack are left out. Names that transformers makes up ("LABEL_0") are none.

    Raises:
        UserError: no such network or no weights, or images that it sees in a way that is not known here.
    """
    folder = _folder(name, weights=True)
    with _one_sentence(name):
        from transformers import AutoModelForImageClassification

        network, said = AutoModelForImageClassification.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **SAFE
        )
    missing, config = set(said["missing_keys"]), network.config
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    return {
        "format": FORMAT,
        "state_dict": {INSIDE + key: value for key, value in network.state_dict().items() if key not in missing},
        "arch": PREFIX + name,
        "num_classes": config.num_labels,
        "classes": None if all(label.startswith("LABEL_") for label in names) else names,
        "configuration": Classifier(network).configuration(),
        **preprocessing(name).describe(),
    }


def preprocessing(name: str) -> Preprocessing:
    """Return what the network's image processor does; without one, the size of its configuration and usual colours.

    Raises:
        UserError: no such network, or a processor that does what our preprocessing cannot.
    """
    folder = _folder(name, weights=False)
    with _one_sentence(name):
        from transformers import AutoConfig, AutoImageProcessor

        if not any(is_file(folder / file) for file in PROCESSORS):
            size = getattr(AutoConfig.from_pretrained(folder, **SAFE), "image_size", None)
            return Preprocessing.of(size if isinstance(size, int) else 224)
        processor = AutoImageProcessor.from_pretrained(folder, **SAFE)
    try:
        return of_processor(processor)
    except ValueError as error:
        raise UserError(f"{PREFIX}{name} prepares images in a way that is not supported: its {error}") from error


def of_processor(processor: Any) -> Preprocessing:
    """Return what an image processor of transformers does to an image.

    With a the factor and b the offset of its first step, x = ((a * bytes - b) - mean) / std.

    Raises:
        ValueError: other than square images of red, green and blue.
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
            three_numbers(_given(processor.image_mean, MEAN), "mean"),
            three_numbers(_given(processor.image_std, STD), "std"),
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


def _given(values: Any, usual: Any) -> Any:
    return usual if values is None else list(values) if isinstance(values, tuple) else values


def _sizes(processor: Any) -> tuple[int, int, str]:
    """Return side, resize and crop of a processor; see `Preprocessing`."""
    asked = {key: value for key, value in dict(processor.size or {}).items() if value is not None}
    short = asked.get("shortest_edge")
    side = int(short) if short is not None else square_side((asked.get("height"), asked.get("width")))
    how = "squash" if short is None else "center"
    if (share := getattr(processor, "crop_pct", None)) is not None and short is not None:  # as ConvNeXt
        return (side, math.floor(side / share), "center") if side < 384 else (side, side, "squash")
    if not getattr(processor, "do_center_crop", False):
        return side, side, how
    cropped = dict(processor.crop_size or {})
    size = square_side((cropped.get("height"), cropped.get("width")))
    return size, max(side, size), how


def folder_of(path: Path) -> Path | None:
    """Return the folder of a file of weights that transformers wrote, None for other files."""
    if path.name not in ("model.safetensors", "pytorch_model.bin") or not is_file(path):
        return None
    try:
        said = json.loads((path.parent / CONFIG).read_bytes())
    except (OSError, ValueError):
        return None
    return path.parent if isinstance(said, dict) and "model_type" in said else None


def _folder(name: str, *, weights: bool) -> Path:
    """Return the folder of a network: one that was named, or that of the cache, to which it is downloaded if need be.

    Raises:
        UserError: transformers is not installed, or there is no such network.
    """
    called = f"{PREFIX}{name}"
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            f"{called} needs transformers: `pip install transformers`, or the extra [huggingface] of this project"
        )
    path = Path(name).expanduser()
    if is_folder(path):
        if not is_file(path / CONFIG):
            raise UserError(f"{called} is a folder without {CONFIG}: give one that save_pretrained() wrote")
        if weights and not _complete(path, weights=True):
            raise UserError(
                f"{called} holds no weights: give a folder with model.safetensors, or, for a student, leave out "
                "--pretrained"
            )
        return path
    if is_file(path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{called} is not a folder: give one with {CONFIG}, or a name on the hub")
    return _of_hub(name, weights=weights)


def _of_hub(name: str, *, weights: bool) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    called = f"{PREFIX}{name}"
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            cached = Path(hub.snapshot_download(name, local_files_only=True))
            if _complete(cached, weights=weights):
                return cached
        listed = hub.HfApi().model_info(name, timeout=10).siblings or []  # unlike a download, it is not retried
        wanted = _wanted([file.rfilename for file in listed], weights=weights)
        found = Path(hub.snapshot_download(name, allow_patterns=wanted))
    except GatedRepoError as error:
        raise UserError(
            f"{called} needs permission from its authors: ask for it on the hub, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{called} is not a folder here, and the hub has no network of this name") from error
    except Exception as error:  # errors of the network have no common class
        raise UserError(
            f"{called} is neither a folder here nor in the cache of Hugging Face, and cannot be downloaded "
            f"({type(error).__name__}): give a folder with {CONFIG} and model.safetensors"
        ) from error
    if not _complete(found, weights=weights):
        raise UserError(f"{called} has no {'weights' if is_file(found / CONFIG) else CONFIG} on the hub: name another")
    return found


def _complete(folder: Path, *, weights: bool) -> bool:
    there = any(next(folder.glob(pattern), None) for pattern in WEIGHTS)
    return is_file(folder / CONFIG) and (there or not weights)


def _wanted(files: Sequence[str], *, weights: bool) -> list[str]:
    """Return which files of a network are downloaded: what describes it, and weights of one kind."""
    found = [file for file in files if "/" not in file and file.endswith(".json")]
    for pattern in WEIGHTS if weights else ():
        if matching := fnmatch.filter([file for file in files if "/" not in file], pattern):
            return found + matching
    return found


@contextlib.contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Keep transformers quiet, and turn what goes wrong in it into one sentence.

    Raises:
        UserError: naming the network.
    """
    with _quiet():
        try:
            yield
        except Exception as error:  # broken files raise whatever their broken bytes happen to mean
            raise UserError(f"{PREFIX}{name} {_cause(error)}") from error


def _cause(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "Unrecognized configuration class" in text:
        return "is no image classifier: transformers has no AutoModelForImageClassification of its configuration"
    if "trust_remote_code" in text or "custom code" in text:
        return "needs code of its own repository, which is never run: choose another network"
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
