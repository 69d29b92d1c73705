"""Networks for torch.hub and the Hugging Face hub, with their classes and preprocessing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from classification.data.images import read_image, to_bytes
from classification.data.preprocessing import Preprocessing
from classification.errors import UserError
from classification.models import build
from classification.models.sizes import fit_size
from classification.models.trained import open_trained
from mgd import logits_of

# Names in other hubs -> names here. The students of MEAL V2 (arXiv:2009.08453) that are called resnest50 there are
# ResNet-50s, as their 25.6 M parameters show.
MEAL_V2 = {
    "mealv1_resnest50": "resnet50",
    "mealv2_resnest50": "resnet50",
    "mealv2_resnest50_cutmix": "resnet50",
    "mealv2_resnest50_380x380": "resnet50",
    "mealv2_mobilenetv3_small_075": "timm:tf_mobilenetv3_small_075",
    "mealv2_mobilenetv3_small_100": "timm:tf_mobilenetv3_small_100",
    "mealv2_mobilenet_v3_large_100": "timm:tf_mobilenetv3_large_100",
    "mealv2_efficientnet_b0": "timm:tf_efficientnet_b0",
}
# Billion-scale semi-supervised learning (arXiv:1905.00546); there, the names end in _ssl and _swsl.
SEMI_SUPERVISED = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "resnext50_32x4d": "torchvision:resnext50_32x4d",
    "resnext101_32x4d": "timm:resnext101_32x4d",
    "resnext101_32x8d": "torchvision:resnext101_32x8d",
    "resnext101_32x16d": "timm:resnext101_32x16d",
}
PUBLISHED = {
    **MEAL_V2,
    **{f"{name}_{how}": arch for name, arch in SEMI_SUPERVISED.items() for how in ("ssl", "swsl")},
    "resnet50d": "timm:resnet50d",  # PaddleClas calls it ResNet50_vd
}


class Classifier(nn.Module, PyTorchModelHubMixin, tags=["image-classification"]):
    """A network with its class names and preprocessing.

    `save_pretrained(FOLDER)`, `from_pretrained(FOLDER_OR_NAME)` and `push_to_hub(NAME)` are those of huggingface_hub.

    Args:
        arch: the network's name.
        num_classes: K.
        classes: class names in order of index, or None.
        preprocessing: values of a `Preprocessing`; missing ones have their defaults.

    Raises:
        UserError: the name is unknown.
    """

    def __init__(
        self,
        arch: str,
        num_classes: int,
        classes: Sequence[str] | None = None,
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = build(arch, num_classes)
        self.arch, self.num_classes = arch, num_classes
        self.classes = None if classes is None else list(classes)
        self.preprocessing = Preprocessing().with_values(preprocessing or {})
        if "img_size" in (preprocessing or {}):  # the shapes of a transformer's weights depend on its training size
            fit_size(self.network, self.preprocessing.img_size)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **more: Any) -> Classifier:
        """Load weights strictly by default; the mixin's default is not strict."""
        loaded: Classifier = super()._from_pretrained(strict=strict, **more)
        return loaded

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K) of normalised images (B, 3, H, W), as `read` returns them."""
        return logits_of(self.network(images))

    def read(self, paths: Iterable[str | Path]) -> Tensor:
        """Read and preprocess image files: (B, 3, img_size, img_size).

        Raises:
            UserError: an image cannot be read.
        """
        transform = self.preprocessing.transform()
        pixels = [transform(to_bytes(read_image(str(path))).permute(2, 0, 1)).permute(1, 2, 0) for path in paths]
        return self.preprocessing.normalise(torch.stack(pixels)).contiguous()

    @torch.no_grad()
    def predict(self, paths: Sequence[str | Path]) -> list[tuple[str, float]]:
        """Return the likeliest class of each image file (the index if classes have no names), and its probability.

        Raises:
            UserError: an image cannot be read.
        """
        device = next(self.parameters()).device
        scores, ids = self(self.read(paths).to(device)).double().softmax(1).max(1)
        names = [str(index) if self.classes is None else self.classes[index] for index in ids.tolist()]
        return list(zip(names, scores.tolist(), strict=True))


def from_checkpoint(path: str | Path, arch: str | None = None) -> Classifier:
    """Open a checkpoint: a best.pth, a safetensors file, or weights of other code.

    Args:
        path: the file.
        arch: name of its network, if the file does not say it.

    Raises:
        UserError: the file cannot be read, or its network is not known.
    """
    trained = open_trained(path, arch)
    described = trained.preprocessing.describe()
    classifier = Classifier(trained.arch, trained.num_classes, trained.classes, described)
    classifier.network.load_state_dict(trained.network.state_dict())
    return classifier.eval()


def network(
    name: str, *, pretrained: bool = False, checkpoint: str | Path | None = None, num_classes: int = 1000
) -> nn.Module:
    """Build a network with fresh weights, or load it from a checkpoint, in eval mode.

    Args:
        name: a name of `PUBLISHED`, or a name here.
        pretrained: True is an error, because this project has no weights to download.
        checkpoint: a file of weights.
        num_classes: for fresh weights; a checkpoint has its own number.

    Raises:
        UserError: `pretrained` is True, or the checkpoint is of another network.
    """
    arch = PUBLISHED.get(name, name)
    if checkpoint is not None:
        return open_trained(checkpoint, arch).network
    if pretrained:
        raise UserError(
            f"this project comes without weights of {name}: make them with `mgd distill DIR --arch {arch}`, and give "
            "the file as checkpoint=FILE"
        )
    return build(arch, num_classes)
