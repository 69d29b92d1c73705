"""Load published weights of torchvision and timm, and find their preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from classification.data.preprocessing import Preprocessing, of_timm, of_torchvision
from classification.errors import UserError
from classification.models import build_published, for_small_images, pretrained_source
from classification.models.weights import head_names, lacking_head, load_strictly, load_with_new_head
from classification.system.weight_files import cause, load

CIFAR_SIZE = 32  # px, the side of CIFAR's images


def load_pretrained(model: nn.Module, arch: str, *, option: str, name: str | None = None, new_head: bool = True) -> str:
    """Load the published ImageNet weights (torchvision's IMAGENET1K_V1, or timm's) into a network.

    Args:
        model: the network.
        arch: its name.
        option: name of the option for a weight file, for the messages.
        name: of torchvision's weights; None for IMAGENET1K_V1.
        new_head: whether to keep the fresh head if the number of classes differs; if not, that is an error.

    Returns:
        One line that says what was loaded.

    Raises:
        UserError: there are no such weights, they cannot be downloaded, or the file in the cache is broken.
    """
    source = pretrained_source(arch)
    if source in (None, "hf"):  # those of Hugging Face are read as files
        raise UserError(f"there are no pretrained weights of {arch}: give a file by {option}")
    try:
        state = _published_state(arch, source, name)
    except Exception as error:  # broken files may raise anything
        # The hub's cache has links: the user must delete their targets, as a deleted link would be restored.
        for path in (link.resolve() for link in _cached(arch, source, name)):
            if reason := _read_error(path):
                raise UserError(
                    f"the pretrained weights of {arch} in the cache cannot be read ({path}: {reason}): delete that "
                    "file, and they are downloaded again"
                ) from error
        if isinstance(error, (KeyError, ValueError)) or (isinstance(error, RuntimeError) and source == "timm"):
            raise UserError(
                f"there are no pretrained weights {name or ''} of {arch} ({error}): give a file by {option}"
            ) from error
        if isinstance(error, (URLError, OSError, RuntimeError)):
            raise UserError(
                f"the pretrained weights of {arch} cannot be downloaded ({error}): give a file by {option}"
            ) from error
        raise
    model_state, num_classes = model.state_dict(), getattr(model, "num_classes", 0)
    if new_head and num_classes and (fresh := lacking_head(model_state, state, num_classes)):
        load_strictly(model, {**state, **fresh}, "the pretrained file", arch)
        return f"{arch}: loaded {len(state)} pretrained tensors, which have no head: it is fresh"
    head = head_names(model_state, state) if new_head else []
    return load_with_new_head(model, state, arch, "the pretrained file", head)


def _published_state(arch: str, source: str, name: str | None) -> dict[str, Tensor]:
    if source != "timm":
        return dict(build_published(source, _torchvision_weights(source, name)).state_dict())
    import timm  # slow to import

    timm.models.set_pretrained_check_hash()
    options: dict[str, Any] = {}
    if cached := _cached(arch, source, name):
        # Without a file, timm would ask the hub for a newer version. The suffix shows the format.
        options["pretrained_cfg_overlay"] = {"file": str(cached[0]), "custom_load": cached[0].suffix == ".npz"}
    else:
        _check_hub(arch)
    return dict(timm.create_model(arch.removeprefix("timm:"), pretrained=True, **options).state_dict())


def _check_hub(arch: str) -> None:
    """Fail fast if the hub with a network's weights does not answer: a download would be retried for a minute.

    Raises:
        OSError: the hub does not answer.
    """
    import huggingface_hub
    import timm

    cfg = timm.models.get_pretrained_cfg(arch.removeprefix("timm:"))
    if cfg is None or not cfg.hf_hub_id:
        return
    try:
        huggingface_hub.HfApi().model_info(cfg.hf_hub_id.split("@")[0], timeout=10)
    except Exception as error:  # connection errors have no common class
        raise OSError(f"{type(error).__name__}: {error}") from error


def _torchvision_weights(source: str, name: str | None) -> Any:
    import torchvision

    return torchvision.models.get_model_weights(source)[name or "IMAGENET1K_V1"]


def _cached(arch: str, source: str, name: str | None) -> list[Path]:
    """Return the files of published weights that are in the caches of torch and Hugging Face."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if source != "timm":
        try:
            url = _torchvision_weights(source, name).url
        except KeyError:
            return []
        return [path for path in [folder / Path(urlparse(url).path).name] if path.is_file()]
    import huggingface_hub
    import timm

    cfg = timm.models.get_pretrained_cfg(arch.removeprefix("timm:"))
    candidates = [folder / Path(urlparse(cfg.url).path).name] if cfg and cfg.url and isinstance(cfg.url, str) else []
    if cfg is not None and cfg.hf_hub_id:
        for file in ("model.safetensors", cfg.hf_hub_filename or "pytorch_model.bin"):
            path = huggingface_hub.try_to_load_from_cache(cfg.hf_hub_id.split("@")[0], file)
            candidates += [Path(path)] if isinstance(path, str) else []
    return [path for path in candidates if path.is_file()]


def _read_error(path: Path) -> str | None:
    """Return why a file cannot be read, or None if it can."""
    try:
        load(path)
    except Exception as error:  # broken files may raise anything
        return cause(path, error).partition(":")[0]  # without the advice after the colon
    return None


def usual_preprocessing(model: nn.Module, arch: str) -> Preprocessing | None:
    """Return the preprocessing of a network whose file does not say it: as published, or 32 px if made for CIFAR."""
    return Preprocessing.of(CIFAR_SIZE, "pad") if for_small_images(arch) else published_preprocessing(model, arch)


def published_preprocessing(model: nn.Module, arch: str, name: str | None = None) -> Preprocessing | None:
    """Return the preprocessing of a network's published weights; None if there are none.

    Args:
        model: the network.
        arch: its name.
        name: of torchvision's weights; None for IMAGENET1K_V1.
    """
    source = pretrained_source(arch)
    if source == "hf":
        from classification.models.huggingface import preprocessing

        return preprocessing(arch.removeprefix("hf:"))
    if source == "timm":
        return of_timm(getattr(model, "pretrained_cfg", {}))
    try:
        # In torchvision these two normalise their input again if they have published weights; here they do not.
        twice = source in ("googlenet", "inception_v3")
        if source is None:
            return None
        return of_torchvision(_torchvision_weights(source, name).transforms(), transform_input=twice)
    except (KeyError, ValueError):
        return None
