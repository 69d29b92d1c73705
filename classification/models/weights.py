"""Weights into networks: files and pretrained ones, strictly, with a sentence on what was loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import timm
import torch
import torchvision
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

from classification.errors import UserError
from classification.models import pretrained_source
from classification.paths import exists, is_file


@dataclass(frozen=True)
class WeightFile:
    """The weights of a checkpoint file, and what it says of them where it says it."""

    path: Path
    state_dict: dict[str, Tensor]
    arch: str | None = None
    num_classes: int | None = None
    classes: list[str] | None = None
    img_size: int | None = None


# What a described checkpoint says of its weights.
DESCRIBED = {
    "arch": (str, "a name"),
    "num_classes": (int, "a number"),
    "classes": (list, "a list"),
    "img_size": (int, "a number"),
}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file written by torch.save that holds tensors and plain values only, or a .safetensors file.

    Raises:
        UserError: missing, not a file, truncated, or holding code.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError(f"checkpoint {path} {'is not a file' if exists(path) else 'does not exist'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a broken file looks like
            if path.suffix == ".safetensors":
                content = load_safetensors(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # broken files raise whatever their broken bytes happen to mean
        raise UserError(
            f"checkpoint {path} cannot be read: it is truncated, of another format, or holds more than tensors and "
            "plain values"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}, not a dictionary of weights")
    return dict(content)


def read_weights(path: str | Path) -> WeightFile:
    """Read weights: a plain state dict, one under "state_dict", with or without "module." before its names.

    Raises:
        UserError: as `read_checkpoint`, or no weights in it.
    """
    content = read_checkpoint(path)
    state = content.get("state_dict", content)
    if not _is_state(state):
        raise UserError(f"checkpoint {path} holds no weights: expected a state dict, or one under 'state_dict'")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    described = {key: content.get(key) for key in DESCRIBED} if state is not content else {}
    for key, (kind, what) in DESCRIBED.items():
        if described.get(key) is not None and not isinstance(described[key], kind):
            raise UserError(f"checkpoint {path} is damaged: its {key!r} is not {what}")
    if not all(isinstance(name, str) for name in described.get("classes") or ()):
        raise UserError(f"checkpoint {path} is damaged: its 'classes' are not names")
    return WeightFile(Path(path), state, **described)


def _is_state(state: object) -> bool:
    return (
        isinstance(state, Mapping)
        and bool(state)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
    )


def load_file(
    model: nn.Module,
    path: str | Path,
    *,
    arch: str,
    num_classes: int,
    classes: list[str] | None,
    img_size: int | None = None,
    new_head: bool = False,
) -> str:
    """Load a file into a network, every tensor of it, or refuse.

    Args:
        model: the network, built for `num_classes`.
        path: checkpoint file.
        arch: the network's name.
        num_classes: its number of classes.
        classes: names in order of index, compared where the file has them too.
        img_size: side of the images that the network will see, in pixels.
        new_head: take a file of other classes too, and leave the head fresh.

    Returns:
        One line that says what was loaded, and where the file was trained on images of another size.

    Raises:
        UserError: another network, class count or class order; it says what differs.
    """
    weights = read_weights(path)
    if weights.arch is not None and weights.arch != arch:
        raise UserError(f"checkpoint {path} holds a {weights.arch}, not a {arch}: change the architecture or the file")
    resized = img_size is not None and weights.img_size not in (None, img_size)
    size = f"; trained at {weights.img_size} px, it will see {img_size} px (--img-size)" if resized else ""
    if new_head and (head := _foreign_head(model.state_dict(), weights, num_classes, classes)):
        return load_with_new_head(model, weights.state_dict, arch, f"checkpoint {path}", head) + size
    if weights.num_classes is not None and weights.num_classes != num_classes:
        raise UserError(f"checkpoint {path} has {weights.num_classes} classes, this run {num_classes}")
    if classes is not None and weights.classes is not None:
        _compare_classes(path, weights.classes, classes)
    load_strictly(model, weights.state_dict, f"checkpoint {path}", arch)
    order = "" if weights.classes is not None else "; it names no classes, so their order could not be checked"
    return f"{arch}: loaded {len(weights.state_dict)} tensors from {path}{order}{size}"


def _compare_classes(path: str | Path, theirs: list[str], ours: list[str]) -> None:
    if theirs == ours:
        return
    for position, (their, our) in enumerate(zip(theirs, ours, strict=False)):
        if their != our:
            what = "stand in another order" if sorted(theirs) == sorted(ours) else "differ"
            raise UserError(
                f"the classes of checkpoint {path} {what}: class {position} is {their!r} there, {our!r} in the data"
            )
    raise UserError(f"checkpoint {path} names {len(theirs)} classes, the data has {len(ours)}")


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str, arch: str) -> None:
    """Load every tensor of a network, no more and no less.

    Args:
        model: the network.
        state: its tensors by name.
        source: what they come from, for the messages.
        arch: the network's name, likewise.

    Raises:
        UserError: other tensors, or values that no training leaves behind.
    """
    if not _is_state(state):
        raise UserError(f"{source} holds no weights")
    own = model.state_dict()
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    if not missing and not unexpected and (head := _head(own, state)):
        theirs, ours = state[head[0]].shape[0], own[head[0]].shape[0]
        raise UserError(f"{source} has {theirs} classes, this run {ours} (by the shape of {head[0]})")
    if missing or unexpected or shapes:
        parts = [
            f"{len(names)} {what} (as {names[0]})"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if names
        ]
        raise UserError(f"{source} does not fit {arch}: tensors {', '.join(parts)}")
    _check_values(model, state, source)
    model.load_state_dict(state)


def _head(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Name the tensors of which `state` has another number of rows, one for all of them; none if more differs."""
    shapes = {n: (state[n].shape, own[n].shape) for n in own if n in state and own[n].shape != state[n].shape}
    rows = {(theirs[:1], ours[:1]) for theirs, ours in shapes.values()}
    alike = all(0 < len(theirs) == len(ours) and theirs[1:] == ours[1:] for theirs, ours in shapes.values())
    return list(shapes) if alike and len(rows) == 1 else []


def _foreign_head(
    own: Mapping[str, Tensor], weights: WeightFile, num_classes: int, classes: list[str] | None
) -> list[str]:
    """Name the tensors of a head that tells other classes; none if it tells these, in any order."""
    if head := _head(own, weights.state_dict):
        return head
    if classes is None or weights.classes is None or sorted(weights.classes) == sorted(classes):
        return []
    rows = [name for name, value in own.items() if value.shape[:1] == (num_classes,)]
    return [name for name in rows if name.rpartition(".")[0] == rows[-1].rpartition(".")[0]]  # the last such module


def _check_values(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are not finite, and what cannot be copied into a network."""
    weights = dict(model.named_parameters())
    for name, value in state.items():
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or value.is_complex():
            raise UserError(f"{source} holds {name} in a form that no network takes")
        value = value.float()  # not every kind of number knows whether it is finite
        bad = ~value.isfinite() if name in weights else value.isnan()
        if bad.any():
            raise UserError(f"{source} holds values that are not finite (in {name}): its training had diverged")


def load_pretrained(model: nn.Module, arch: str, *, option: str, name: str | None = None) -> str:
    """Load the published ImageNet weights (torchvision's IMAGENET1K_V1, or timm's) into a network.

    The head stays fresh where the number of classes differs.

    Args:
        model: the network.
        arch: its name.
        option: the option that gives a file instead, for the messages.
        name: of torchvision's weights; None for IMAGENET1K_V1.

    Returns:
        One line that says what was loaded.

    Raises:
        UserError: no such weights are published, or they cannot be downloaded.
    """
    source = pretrained_source(arch)
    if source is None:
        raise UserError(f"there are no pretrained weights of {arch}: give a file by {option}")
    try:
        if source == "timm":
            timm.models.set_pretrained_check_hash()
            state = timm.create_model(arch.removeprefix("timm:"), pretrained=True).state_dict()
        else:
            weights = torchvision.models.get_model_weights(source)[name or "IMAGENET1K_V1"]
            state = weights.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError) as error:
        raise UserError(
            f"the pretrained weights of {arch} cannot be downloaded ({error}): give a file by {option}"
        ) from error
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"there are no pretrained weights {name or ''} of {arch} ({error}): give a file by {option}"
        ) from error
    return load_with_new_head(model, state, arch, "the pretrained file", _head(model.state_dict(), state))


def load_with_new_head(model: nn.Module, state: Mapping[str, Tensor], arch: str, source: str, head: list[str]) -> str:
    """Load `state` but for the tensors of a head of other classes, and say so."""
    own = model.state_dict()
    kept = {name: own[name] if name in head else value for name, value in state.items()}
    load_strictly(model, kept, source, arch)
    if not head:
        return f"{arch}: loaded {len(kept)} tensors from {source}"
    theirs, ours = state[head[0]].shape[0], own[head[0]].shape[0]
    swapped = f"{theirs} -> {ours} classes" if theirs != ours else "for other classes"
    return f"{arch}: loaded {len(kept) - len(head)} tensors from {source}; head swapped, {swapped}"
