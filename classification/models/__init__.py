"""Networks by name: our own, torchvision's and timm's, and where each named family is tapped."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from classification.errors import UserError
from classification.models.cifar import CifarResNet, WideResNet, cifar_resnet
from classification.models.mobilenet import MobileNetV1, cifar_mobilenet_v2, mobilenet_v2_mgd


# torchvision and timm take longer to import than torch: they are imported when one of their networks is built.
def _torchvision(name: str, **options: Any) -> nn.Module:
    import torchvision

    network: nn.Module = torchvision.models.get_model(name, **options)
    return network


def _torchvision_names() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **options)


def _shufflenet_v2(**options: Any) -> nn.Module:
    from classification.models.shufflenet import shufflenet_v2

    return shufflenet_v2(**options)


def _pplcnet_x2_5(**options: Any) -> nn.Module:
    from classification.models.pplcnet import pplcnet_x2_5

    return pplcnet_x2_5(**options)


# The named networks: how to build each for a number of classes, and torchvision's name for its pretrained weights.
NETWORKS: dict[str, tuple[Callable[..., nn.Module], str | None]] = {
    "mobilenet_v1": (MobileNetV1, None),
    "mobilenet_v2": (partial(_torchvision, "mobilenet_v2"), "mobilenet_v2"),
    "mobilenet_v2_mgd": (mobilenet_v2_mgd, "mobilenet_v2"),
    "shufflenet_v2": (_shufflenet_v2, "shufflenet_v2_x1_0"),
    "pplcnet_x2_5": (_pplcnet_x2_5, None),
    **{f"resnet{n}": (partial(_torchvision, f"resnet{n}"), f"resnet{n}") for n in (18, 34, 50, 101, 152)},
    **{f"cifar_resnet{n}": (partial(cifar_resnet, n), None) for n in (20, 32, 44, 56, 110)},
    "cifar_resnet8x4": (partial(CifarResNet, 1, (32, 64, 128, 256)), None),
    "cifar_resnet32x4": (partial(CifarResNet, 5, (32, 64, 128, 256)), None),
    "cifar_mobilenet_v2": (cifar_mobilenet_v2, None),
    "wrn_16_2": (partial(WideResNet, 16, 2), None),
    "wrn_40_2": (partial(WideResNet, 40, 2), None),
}

_WIDTH = re.compile(
    r"cifar_resnet(?P<layers>\d{1,9})(_w(?P<factor>\d{1,9}(\.\d{1,9})?)|_(?P<widths>\d{1,9}(-\d{1,9}){2}))?"
)


def _last_blocks(*blocks: int) -> list[str]:
    """The sum before the last ReLU of each stage, in a ResNet of so many blocks a stage."""
    return [f"layer{stage}.{number - 1}.relu@in#-1" for stage, number in enumerate(blocks, start=1)]


_TAPS: dict[str, list[str]] = {
    "mobilenet_v1": [f"model.{block}.5@in" for block in (3, 5, 11, 13)],
    "mobilenet_v2": [f"features.{block}.conv.1.2@in" for block in (6, 13, 17)],
    "mobilenet_v2_mgd": [f"features.{block}.conv.1.2@in" for block in (7, 11, 17)],
    "cifar_mobilenet_v2": [f"features.{block}.conv.1.2@in" for block in (3, 5, 8)],
    "shufflenet_v2": ["stage2", "stage3", "stage4.3"],
    "pplcnet_x2_5": [f"blocks.{end}.bn2.act@in" for end in ("1.1", "2.1", "4.3", "5.1")],
    "resnet18": _last_blocks(2, 2, 2, 2),
    "resnet34": _last_blocks(3, 4, 6, 3),
    "resnet50": _last_blocks(3, 4, 6, 3),
    "resnet101": _last_blocks(3, 4, 23, 3),
    "resnet152": _last_blocks(3, 8, 36, 3),
}

# The teachers of the published pairs; every other student gets resnet50.
DEFAULT_TEACHER = {"resnet50": "resnet152"}


def default_taps(arch: str, model: nn.Module) -> list[str] | None:
    """Return the tap paths of a named family, deepest last, or None where the user has to name them."""
    if isinstance(model, CifarResNet):
        return _last_blocks(*(len(getattr(model, f"layer{stage}")) for stage in (1, 2, 3)))
    if isinstance(model, WideResNet):
        return ["layer2.0.relu1@in", "layer3.0.relu1@in", "relu@in"]
    return _TAPS.get(arch.removeprefix("torchvision:"))


def _unknown(arch: str, known: list[str]) -> UserError:
    near = difflib.get_close_matches(arch, known, n=4, cutoff=0.5) or sorted(known)[:8]
    return UserError(f"unknown architecture {arch!r}; close ones are {', '.join(near)}")


def _builder(arch: str) -> tuple[Callable[..., nn.Module], str | None]:
    """Return how to build `arch`, and torchvision's name for its weights ("timm" where timm loads them)."""
    if arch.startswith("torchvision:"):
        name, known = arch.removeprefix("torchvision:"), _torchvision_names()
        if name not in known:
            raise _unknown(arch, [f"torchvision:{n}" for n in known])
        options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        return partial(_torchvision, name, **options), name
    if arch.startswith("timm:"):
        import timm

        name, known = arch.removeprefix("timm:"), timm.list_models()
        if name.split(".")[0] not in known:
            raise _unknown(arch, [f"timm:{n}" for n in known])
        return partial(_timm, name), "timm"
    if arch in NETWORKS:
        return NETWORKS[arch]
    match = _WIDTH.fullmatch(arch)
    if match is None:
        raise _unknown(arch, [*NETWORKS, *(f"torchvision:{n}" for n in _torchvision_names())])
    widths = tuple(int(width) for width in match["widths"].split("-")) if match["widths"] else None
    return partial(cifar_resnet, int(match["layers"]), float(match["factor"] or 1), widths=widths), None


def build(arch: str, num_classes: int) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        arch: a key of `NETWORKS`, "cifar_resnetN_wF" (N layers, widths times F), "cifar_resnetN_A-B-C" (those
            widths), "torchvision:NAME" or "timm:NAME".
        num_classes: K.

    Raises:
        UserError: unknown name, with close matches.
    """
    builder, _ = _builder(arch)
    try:
        return builder(num_classes=num_classes)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot build {arch!r}: {error}") from error


def pretrained_source(arch: str) -> str | None:
    """Return torchvision's name for the pretrained weights of `arch`, "timm" for timm's, None where there are none."""
    return _builder(arch)[1]


def build_published(source: str, weights: Any) -> nn.Module:
    """Build a network with the weights that torchvision publishes, names of earlier versions turned into its own."""
    builder, _ = _builder(f"torchvision:{source}")
    return builder(weights=weights, progress=False)


def known_name(arch: str) -> str | None:
    """Return our name of a network that others may call without torchvision:, timm: or cifar_; None where unknown."""
    for name in (arch, f"timm:{arch}", f"torchvision:{arch}", f"cifar_{arch}"):
        try:
            _builder(name)
        except UserError:
            continue
        return name
    return None


def may_be_same(one: str, other: str) -> bool:
    """Return whether two names may be of one network, by whoever wrote them; that the weights fit decides."""
    origins, plain = zip(*(_parts(name) for name in (one, other)), strict=True)
    return plain[0] == plain[1] and (origins[0] == origins[1] or "" in origins)


def _parts(arch: str) -> tuple[str, str]:
    """Return where a name comes from, "" where it does not say, and the name itself in small letters and numbers."""
    source = NETWORKS[arch][1] if arch in NETWORKS else None
    if source is not None and NETWORKS[arch][0] is not mobilenet_v2_mgd:
        return "", _plain(source)  # torchvision's own, or one that computes the same from the same weights
    origin, colon, name = arch.partition(":")
    if not colon:
        origin, name = "", arch.lower().removeprefix("cifar_")
    return origin, _plain(name.split(".")[0] if origin == "timm" else name)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())
