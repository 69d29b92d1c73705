"""Tiny random networks of transformers, and images for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

SIZE, CLASSES = 32, 3


def vit(seed: int, depth: int = 2, **options: Any) -> ViTForImageClassification:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": depth, "num_attention_heads": 4}
    shape |= {"intermediate_size": 64, "image_size": SIZE, "patch_size": 8}
    shape |= {} if "id2label" in options else {"num_labels": CLASSES}
    network = ViTForImageClassification(ViTConfig(**{**shape, **options}))
    network.train(False)
    return network


def mobilenet(seed: int, **options: Any) -> MobileNetV2ForImageClassification:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"depth_multiplier": 0.25, "depth_divisible_by": 4, "min_depth": 4, "num_labels": CLASSES}
    shape |= {"image_size": SIZE, "classifier_dropout_prob": 0.1}
    return MobileNetV2ForImageClassification(MobileNetV2Config(**{**shape, **options}))


class Images(Dataset[dict[str, Any]]):
    """Noise with labels; an item draws a random number, as a transform does."""

    def __init__(self, number: int = 24) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(number, 3, SIZE, SIZE, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index] + 0.01 * torch.randn(()), "labels": index % CLASSES, "index": index}


class Fixed(Images):
    """The same without randomness."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index], "labels": index % CLASSES}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    usual: dict[str, Any] = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "learning_rate": 0.01}
    usual |= {"logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    return TrainingArguments(str(folder), **{**usual, **options})


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert set(one) == set(other)
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)
