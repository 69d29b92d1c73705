"""Published weights: loaded from where torchvision and timm keep them, and how their images were seen."""

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

SMALL = 32  # pixels of a side


def load_pretrained(model: nn.Module, arch: str, *, option: str, name: str | None = None, new_head: bool = True) -> str:
    """Load the published ImageNet weights (torchvision's IMAGENET1K_V1, or timm's) into a network.

    Args:
        model: the network.
        arch: its name.
        option: the option that gives a file instead, for the messages.
        name: of torchvision's weights; None for IMAGENET1K_V1.
        new_head: leave the head fresh where the number of classes differs, instead of refusing.

    Returns:
        One line that says what was loaded.

    Raises:
        UserError: no such weights are published, they cannot be downloaded, or the file in the cache is broken.
    """
    source = pretrained_source(arch)
    if source in (None, "hf"):  # those of Hugging Face are read as files
        raise UserError(f"there are no pretrained weights of {arch}: give a file by {option}")
    try:
        state = _published(arch, source, name)
    except Exception as error:  # broken files raise whatever their broken bytes happen to mean
        for path in (link.resolve() for link in _cached(arch, source, name)):  # links alone would be made again
            if why := _broken(path):
                raise UserError(
                    f"the pretrained weights of {arch} in the cache cannot be read ({path}: {why}): delete that file, "
                    "and they are downloaded again"
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
    own, number = model.state_dict(), getattr(model, "num_classes", 0)
    if new_head and number and (fresh := lacking_head(own, state, number)):
        load_strictly(model, {**state, **fresh}, "the pretrained file", arch)
        return f"{arch}: loaded {len(state)} pretrained tensors, which have no head: it is fresh"
    head = head_names(own, state) if new_head else []
    return load_with_new_head(model, state, arch, "the pretrained file", head)


def _published(arch: str, source: str, name: str | None) -> dict[str, Tensor]:
    if source != "timm":
        return dict(build_published(source, _weights(source, name)).state_dict())
    import timm  # slow to import, as torchvision

    timm.models.set_pretrained_check_hash()
    more: dict[str, Any] = {}
    if cached := _cached(arch, source, name):
        # Named as a file, or it would ask the hub for a newer one; timm tells the format by the suffix.
        more["pretrained_cfg_overlay"] = {"file": str(cached[0]), "custom_load": cached[0].suffix == ".npz"}
    else:
        _ask_hub(arch)
    return dict(timm.create_model(arch.removeprefix("timm:"), pretrained=True, **more).state_dict())


def _ask_hub(arch: str) -> None:
    """Fail at once if the hub of a network's weights does not answer: a download would be tried for a minute.

    Raises:
        OSError: it does not.
    """
    import huggingface_hub
    import timm

    cfg = timm.models.get_pretrained_cfg(arch.removeprefix("timm:"))
    if cfg is None or not cfg.hf_hub_id:
        return
    try:
        huggingface_hub.HfApi().model_info(cfg.hf_hub_id.split("@")[0], timeout=10)
    except Exception as error:  # errors of the network have no common class
        raise OSError(f"{type(error).__name__}: {error}") from error


def _weights(source: str, name: str | None) -> Any:
    import torchvision

    return torchvision.models.get_model_weights(source)[name or "IMAGENET1K_V1"]


def _cached(arch: str, source: str, name: str | None) -> list[Path]:
    """Return the files of published weights that are in the caches of torch and of Hugging Face."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if source != "timm":
        try:
            url = _weights(source, name).url
        except KeyError:
            return []
        return [path for path in [folder / Path(urlparse(url).path).name] if path.is_file()]
    import huggingface_hub
    import timm

    cfg = timm.models.get_pretrained_cfg(arch.removeprefix("timm:"))
    found = [folder / Path(urlparse(cfg.url).path).name] if cfg and cfg.url and isinstance(cfg.url, str) else []
    if cfg is not None and cfg.hf_hub_id:
        for file in ("model.safetensors", cfg.hf_hub_filename or "pytorch_model.bin"):
            path = huggingface_hub.try_to_load_from_cache(cfg.hf_hub_id.split("@")[0], file)
            found += [Path(path)] if isinstance(path, str) else []
    return [path for path in found if path.is_file()]


def _broken(path: Path) -> str | None:
    """Say why a file cannot be read; None where it can."""
    try:
        load(path)
    except Exception as error:  # as above
        return cause(path, error).partition(":")[0]  # without what to do
    return None


def usual_preprocessing(model: nn.Module, arch: str) -> Preprocessing | None:
    """Return what a network sees if its file does not say it: as published, or 32 px if it was made for CIFAR."""
    return Preprocessing.of(SMALL, "pad") if for_small_images(arch) else published_preprocessing(model, arch)


def published_preprocessing(model: nn.Module, arch: str, name: str | None = None) -> Preprocessing | None:
    """Return the preprocessing of the published weights of a network; None where there are none.

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
        # These two normalise once more where torchvision loads the published weights, and ours do not.
        twice = source in ("googlenet", "inception_v3")
        return None if source is None else of_torchvision(_weights(source, name).transforms(), transform_input=twice)
    except (KeyError, ValueError):
        return None
