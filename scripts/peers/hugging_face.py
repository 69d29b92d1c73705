"""Distil mobilenet_v2 from a ResNet-18 by the Trainer of transformers, as its tutorials have it.

The tutorials on image classification and on distillation, taken together: `datasets` reads the folder, torchvision
augments an image when it is asked for, and a subclass of Trainer adds the distillation to the loss. Every option that
the job does not name keeps the Trainer's default. scripts/bench_peers.py runs this file.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from datasets import load_dataset
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms
from torchvision.models.mobilenetv2 import mobilenet_v2
from torchvision.models.resnet import resnet18
from transformers import Trainer, TrainingArguments

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Distilling(Trainer):
    """A Trainer whose loss is cross-entropy + T^2 KL(teacher || student)."""

    def __init__(self, *args: Any, teacher: nn.Module, temperature: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.temperature = teacher.to(self.args.device).eval(), temperature

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Return the loss of a batch."""
        logits = model(inputs["pixel_values"])
        with torch.no_grad(), self.accelerator.autocast():
            known = self.teacher(inputs["pixel_values"])
        student = F.log_softmax(logits.float() / self.temperature, dim=1)
        teacher = F.softmax(known.float() / self.temperature, dim=1)
        softened = F.kl_div(student, teacher, reduction="batchmean")
        return F.cross_entropy(logits, inputs["labels"]) + self.temperature**2 * softened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="photographs: train/CLASS/*.jpg")
    parser.add_argument("--teacher", required=True, help="state_dict of the ResNet-18")
    parser.add_argument("--output", required=True, help="folder for what the Trainer writes")
    parser.add_argument("--img-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--workers", type=int, default=0, help="loading processes; the Trainer's default is 0")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    args = parser.parse_args()
    images = load_dataset("imagefolder", data_dir=f"{args.folder}/train", split="train")
    classes = images.features["label"].num_classes
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(args.img_size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    def augmented(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pixels = [augment(image.convert("RGB")) for image in batch["image"]]
        return {"pixel_values": pixels, "labels": batch["label"]}

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        pixels = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixels, "labels": torch.tensor([example["labels"] for example in examples])}

    student = mobilenet_v2(num_classes=classes)
    teacher = resnet18(num_classes=classes)
    teacher.load_state_dict(torch.load(args.teacher, weights_only=True))
    sgd = torch.optim.SGD(student.parameters(), args.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    options = TrainingArguments(
        args.output,
        per_device_train_batch_size=args.batch_size,
        dataloader_num_workers=args.workers,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,  # the others do not clip
        remove_unused_columns=False,
        bf16=args.bf16,
        use_cpu=True,
        report_to="none",
    )
    Distilling(
        student,
        options,
        teacher=teacher,
        temperature=4.0,
        data_collator=collate,
        train_dataset=images.with_transform(augmented),
        optimizers=(sgd, None),
    ).train()


if __name__ == "__main__":
    main()
