"""Build networks of torchvision and timm by their names there."""

from __future__ import annotations

from typing import Any

from torch import nn


def from_torchvision(name: str, **options: Any) -> nn.Module:
    """Build a network of torchvision, without auxiliary heads."""
    import torchvision

    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, **options}
    network: nn.Module = torchvision.models.get_model(name, **options)
    return network


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classifiers."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def from_timm(name: str, **options: Any) -> nn.Module:
    """Build a network of timm."""
    import timm

    return timm.create_model(name, **options)


def timm_names() -> list[str]:
    """Return the names of timm's networks, without the tags of their weights."""
    import timm

    names: list[str] = timm.list_models()
    return names
