"""Entry points of torch.hub: torch.hub.load(REPO, NAME, checkpoint="best.pth", source="local").

No weights are shipped. Without a checkpoint a network has fresh weights; `mgd train` and `mgd distill` make some.
"""

from __future__ import annotations

from collections.abc import Callable as _Callable
from pathlib import Path as _Path

from torch import nn

from classification.errors import UserError as _UserError
from classification.models import hub as _hub

dependencies = ["torch", "torchvision", "timm", "numpy", "safetensors", "huggingface_hub"]


def _entry(name: str) -> _Callable[..., nn.Module]:
    """Return the entry point of a network."""

    def build(pretrained: bool = False, *, checkpoint: str | _Path | None = None, num_classes: int = 1000) -> nn.Module:
        return _hub.network(name, pretrained=pretrained, checkpoint=checkpoint, num_classes=num_classes)

    build.__doc__ = f"""Build {_hub.PUBLISHED.get(name, name)} with fresh weights, or with those of a checkpoint.

    Args:
        pretrained: refused if true, as no weights are shipped.
        checkpoint: a file of weights; the network is then in eval mode.
        num_classes: of a network with fresh weights.
    """
    return build


def checkpoint(path: str | _Path, arch: str | None = None) -> nn.Module:
    """Open a checkpoint: the network in eval mode, with `classes`, `preprocessing`, `predict` and `save_pretrained`.

    Args:
        path: a best.pth, a safetensors file, or weights of other code.
        arch: the network, for a file that does not say it.
    """
    return _hub.from_checkpoint(path, arch)


def meal_v2(
    model_name: str, pretrained: bool = False, *, checkpoint: str | _Path | None = None, num_classes: int = 1000
) -> nn.Module:
    """Build a student of MEAL V2 by its name there. Those called resnest50 are ResNet-50s, by their 25.6 M parameters.

    No weights are shipped: pretrained=True is refused; recipes in classification/recipes train them.
    """
    name = model_name.lower()
    if name not in _hub.MEAL_V2:
        raise _UserError(f"meal_v2 has no {model_name!r}: there are {', '.join(_hub.MEAL_V2)}")
    return _hub.network(name, pretrained=pretrained, checkpoint=checkpoint, num_classes=num_classes)


mobilenet_v1 = _entry("mobilenet_v1")
mobilenet_v2 = _entry("mobilenet_v2")
mobilenet_v2_mgd = _entry("mobilenet_v2_mgd")
shufflenet_v2 = _entry("shufflenet_v2")
pplcnet_x2_5 = _entry("pplcnet_x2_5")
resnet18 = _entry("resnet18")
resnet34 = _entry("resnet34")
resnet50 = _entry("resnet50")
resnet101 = _entry("resnet101")
resnet152 = _entry("resnet152")
resnet50d = _entry("resnet50d")
cifar_resnet20 = _entry("cifar_resnet20")
cifar_resnet32 = _entry("cifar_resnet32")
cifar_resnet44 = _entry("cifar_resnet44")
cifar_resnet56 = _entry("cifar_resnet56")
cifar_resnet110 = _entry("cifar_resnet110")
cifar_resnet8x4 = _entry("cifar_resnet8x4")
cifar_resnet32x4 = _entry("cifar_resnet32x4")
cifar_mobilenet_v2 = _entry("cifar_mobilenet_v2")
wrn_16_2 = _entry("wrn_16_2")
wrn_40_2 = _entry("wrn_40_2")
wrn_40_1 = _entry("wrn_40_1")
crd_resnet20 = _entry("crd_resnet20")
crd_resnet32 = _entry("crd_resnet32")
crd_resnet44 = _entry("crd_resnet44")
crd_resnet56 = _entry("crd_resnet56")
crd_resnet110 = _entry("crd_resnet110")
crd_resnet8x4 = _entry("crd_resnet8x4")
crd_resnet32x4 = _entry("crd_resnet32x4")
crd_resnet50 = _entry("crd_resnet50")
crd_wrn_16_2 = _entry("crd_wrn_16_2")
crd_wrn_40_1 = _entry("crd_wrn_40_1")
crd_wrn_40_2 = _entry("crd_wrn_40_2")
crd_vgg8 = _entry("crd_vgg8")
crd_vgg13 = _entry("crd_vgg13")
crd_shufflenet_v1 = _entry("crd_shufflenet_v1")
crd_shufflenet_v2 = _entry("crd_shufflenet_v2")
crd_mobilenet_v2 = _entry("crd_mobilenet_v2")

mealv1_resnest50 = _entry("mealv1_resnest50")
mealv2_resnest50 = _entry("mealv2_resnest50")
mealv2_resnest50_cutmix = _entry("mealv2_resnest50_cutmix")
mealv2_resnest50_380x380 = _entry("mealv2_resnest50_380x380")
mealv2_mobilenetv3_small_075 = _entry("mealv2_mobilenetv3_small_075")
mealv2_mobilenetv3_small_100 = _entry("mealv2_mobilenetv3_small_100")
mealv2_mobilenet_v3_large_100 = _entry("mealv2_mobilenet_v3_large_100")
mealv2_efficientnet_b0 = _entry("mealv2_efficientnet_b0")

resnet18_ssl = _entry("resnet18_ssl")
resnet50_ssl = _entry("resnet50_ssl")
resnext50_32x4d_ssl = _entry("resnext50_32x4d_ssl")
resnext101_32x4d_ssl = _entry("resnext101_32x4d_ssl")
resnext101_32x8d_ssl = _entry("resnext101_32x8d_ssl")
resnext101_32x16d_ssl = _entry("resnext101_32x16d_ssl")
resnet18_swsl = _entry("resnet18_swsl")
resnet50_swsl = _entry("resnet50_swsl")
resnext50_32x4d_swsl = _entry("resnext50_32x4d_swsl")
resnext101_32x4d_swsl = _entry("resnext101_32x4d_swsl")
resnext101_32x8d_swsl = _entry("resnext101_32x8d_swsl")
resnext101_32x16d_swsl = _entry("resnext101_32x16d_swsl")
