"""Build networks by name: this project's, and those of torchvision, timm and Hugging Face; their default taps."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import nn

from classification.errors import UserError
from classification.models import published


@dataclass(frozen=True)
class Network:
    """How to build a named network. Its file is imported when it is built: torchvision and timm are slow to import.

    If the file has a function `taps(arch, model)`, this returns the paths of the network's taps, deepest last, or None.

    Args:
        file: name of a file in this folder, as ".name".
        function: its function, which takes num_classes.
        source: torchvision's name for its pretrained weights, "timm", "hf", or None.
        options: arguments of the function besides num_classes.
    """

    file: str
    function: str
    source: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, **more: Any) -> nn.Module:
        """Build the network with fresh weights."""
        network: nn.Module = getattr(import_module(self.file, __name__), self.function)(**self.options, **more)
        return network

    def taps(self, arch: str, model: nn.Module | None) -> list[str] | None:
        """Return the paths of the default taps, or None."""
        taps: Callable[..., list[str] | None] = getattr(import_module(self.file, __name__), "taps", _no_taps)
        return taps(arch, model)


def _no_taps(arch: str, model: nn.Module | None) -> None:
    return None


WIDE_STAGES = (32, 64, 128, 256)

NETWORKS = {
    "mobilenet_v1": Network(".mobilenet", "MobileNetV1"),
    "mobilenet_v2": Network(".mobilenet", "mobilenet_v2", "mobilenet_v2"),
    "mobilenet_v2_mgd": Network(".mobilenet", "mobilenet_v2_mgd", "mobilenet_v2"),
    "shufflenet_v2": Network(".shufflenet", "shufflenet_v2", "shufflenet_v2_x1_0"),
    "pplcnet_x2_5": Network(".pplcnet", "pplcnet_x2_5"),
    **{f"resnet{n}": Network(".resnet", "resnet", f"resnet{n}", {"layers": n}) for n in (18, 34, 50, 101, 152)},
    **{f"cifar_resnet{n}": Network(".cifar", "cifar_resnet", None, {"layers": n}) for n in (20, 32, 44, 56, 110)},
    "cifar_resnet8x4": Network(".cifar", "CifarResNet", None, {"depth": 1, "widths": WIDE_STAGES}),
    "cifar_resnet32x4": Network(".cifar", "CifarResNet", None, {"depth": 5, "widths": WIDE_STAGES}),
    "cifar_mobilenet_v2": Network(".mobilenet", "cifar_mobilenet_v2"),
    "wrn_16_2": Network(".cifar", "WideResNet", None, {"depth": 16, "width": 2}),
    "wrn_40_1": Network(".cifar", "WideResNet", None, {"depth": 40, "width": 1}),
    "wrn_40_2": Network(".cifar", "WideResNet", None, {"depth": 40, "width": 2}),
    **{f"crd_resnet{n}": Network(".crd", "conv_resnet", None, {"layers": n}) for n in (20, 32, 44, 56, 110)},
    **{f"crd_resnet{n}x4": Network(".crd", "conv_resnet", None, {"layers": n, "wide": True}) for n in (8, 32)},
    "crd_resnet50": Network(".crd", "resnet50"),
    "crd_wrn_16_2": Network(".crd", "wide_resnet", None, {"depth": 16, "width": 2}),
    "crd_wrn_40_1": Network(".crd", "wide_resnet", None, {"depth": 40, "width": 1}),
    "crd_wrn_40_2": Network(".crd", "wide_resnet", None, {"depth": 40, "width": 2}),
    "crd_vgg8": Network(".crd", "VGG", None, {"convolutions": (1, 1, 1, 1, 1)}),
    "crd_vgg13": Network(".crd", "VGG", None, {"convolutions": (2, 2, 2, 2, 2)}),
    "crd_shufflenet_v1": Network(".crd", "ShuffleNetV1"),
    "crd_shufflenet_v2": Network(".crd", "shufflenet_v2"),
    "crd_mobilenet_v2": Network(".crd", "MobileNetV2"),
}

CIFAR_NAME = re.compile(
    r"cifar_resnet(?P<layers>\d{1,9})(_w(?P<factor>\d{1,9}(\.\d{1,9})?)|_(?P<widths>\d{1,9}(-\d{1,9}){2}))?"
)


# Networks that can load published weights, but do not compute the same as the published network.
NOT_EQUIVALENT = {"mobilenet_v2_mgd"}


def default_taps(arch: str, model: nn.Module | None) -> list[str] | None:
    """Return the default tap paths of a network, deepest last, or None if it has none."""
    name = arch.removeprefix("torchvision:")
    network = NETWORKS.get(name) or _cifar_network(name)
    return None if network is None else network.taps(name, model)


def for_small_images(arch: str) -> bool:
    """Return whether a network is made for CIFAR's images of 32 px."""
    network = NETWORKS.get(arch) or _cifar_network(arch)
    return network is not None and (network.file in (".cifar", ".crd") or network.function == "cifar_mobilenet_v2")


def _cifar_network(arch: str) -> Network | None:
    """Return the ResNet for 32 px that a name like cifar_resnet20_w2 describes, or None."""
    match = CIFAR_NAME.fullmatch(arch)
    if match is None:
        return None
    widths = tuple(int(width) for width in match["widths"].split("-")) if match["widths"] else None
    options = {"layers": int(match["layers"]), "factor": float(match["factor"] or 1), "widths": widths}
    return Network(".cifar", "cifar_resnet", None, options)


def _unknown_name(arch: str, names: list[str]) -> UserError:
    close = difflib.get_close_matches(arch, names, n=4, cutoff=0.5) or sorted(names)[:8]
    return UserError(f"unknown architecture {arch!r}; close ones are {', '.join(close)}")


def _network(arch: str) -> Network:
    """Return how to build `arch`."""
    if arch.startswith("torchvision:"):
        name, names = arch.removeprefix("torchvision:"), published.torchvision_names()
        if name not in names:
            raise _unknown_name(arch, [f"torchvision:{n}" for n in names])
        return Network(".published", "from_torchvision", name, {"name": name})
    if arch.startswith("timm:"):
        name, names = arch.removeprefix("timm:"), published.timm_names()
        if name.split(".")[0] not in names:
            raise _unknown_name(arch, [f"timm:{n}" for n in names])
        return Network(".published", "from_timm", "timm", {"name": name})
    if (name := arch.removeprefix("hf:")) != arch:
        if not name:
            raise UserError("hf: names no network: write hf:FOLDER, or hf:NAME of one on the hub")
        return Network(".huggingface", "from_huggingface", "hf", {"name": name})
    network = NETWORKS.get(arch) or _cifar_network(arch)
    if network is None:
        raise _unknown_name(arch, [*NETWORKS, *(f"torchvision:{n}" for n in published.torchvision_names())])
    return network


def build(arch: str, num_classes: int, configuration: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        arch: a key of `NETWORKS`, "cifar_resnetN_wF" (N layers, widths times F), "cifar_resnetN_A-B-C" (those
            widths), "torchvision:NAME", "timm:NAME" or "hf:NAME_OR_FOLDER".
        num_classes: K.
        configuration: of a Hugging Face network, from its checkpoint, or None.

    Raises:
        UserError: the name is unknown (the message has close ones), or the network cannot be built.
    """
    network = _network(arch)
    extra = {"configuration": configuration} if configuration and network.source == "hf" else {}
    try:
        return network.build(num_classes=num_classes, **extra)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot build {arch!r}: {error}") from error


def configuration(network: nn.Module) -> dict[str, Any]:
    """Return {"configuration": ...} if a network needs it to be built, else {}; it is stored in checkpoints."""
    describe: Callable[[], dict[str, Any]] | None = getattr(network, "configuration", None)
    return {} if describe is None else {"configuration": describe()}


def pretrained_source(arch: str) -> str | None:
    """Return torchvision's name for the pretrained weights of `arch`; "timm" or "hf" for theirs; None without any."""
    return _network(arch).source


def build_published(source: str, weights: Any) -> nn.Module:
    """Build a torchvision network with published weights; torchvision renames tensors of older versions."""
    return _network(f"torchvision:{source}").build(weights=weights, progress=False)


def known_name(arch: str) -> str | None:
    """Return a network's name here, or None if unknown; other code may leave out torchvision:, timm: or cifar_."""
    for name in (arch, f"timm:{arch}", f"torchvision:{arch}", f"cifar_{arch}"):
        try:
            _network(name)
        except UserError:
            continue
        return name
    return None


def may_be_same(one: str, other: str) -> bool:
    """Return whether two names, in this project's or other code's spelling, may stand for the same network."""
    if one.startswith("hf:") and other.startswith("hf:"):
        return True  # the same network may be in several folders
    libraries, names = zip(*(_split_name(name) for name in (one, other)), strict=True)
    return names[0] == names[1] and (libraries[0] == libraries[1] or "" in libraries)


def _split_name(arch: str) -> tuple[str, str]:
    """Return the library of a name, "" if it does not say, and the plain name."""
    source = NETWORKS[arch].source if arch in NETWORKS else None
    if source is not None and arch not in NOT_EQUIVALENT:
        return "", _plain(source)  # torchvision's network, or an equivalent one
    library, colon, name = arch.partition(":")
    if not colon:
        library, name = "", arch.lower().removeprefix("cifar_")
    return library, _plain(name.split(".")[0] if library == "timm" else name)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())
