"""What a user types for one job in each project: mobilenet_v2 learns from a ResNet-18 by cross-entropy + KD, T 4."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template

import torch
from torchvision.models import resnet18

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Job:
    """What all peers do.

    Args:
        folder: train/CLASS/*.jpg and valid/CLASS/*.jpg.
        work: folder for weights and all that the peers write.
        classes: number of class folders.
        img_size: pixels.
        batch_size: images per step.
        lr: constant.
    """

    folder: Path
    work: Path
    classes: int
    img_size: int
    batch_size: int
    lr: float = 0.01

    @property
    def weights(self) -> Path:
        """File with the teacher's state_dict."""
        return self.work / "teacher.pth"

    def prepare(self) -> None:
        """Write the teacher, one for all, in the forms that the peers read.

        It is not trained, which makes it no slower; its last layer is enlarged, so that there is much to learn from it
        in a few steps.
        """
        torch.manual_seed(0)
        state = resnet18(num_classes=self.classes).state_dict()
        state["fc.weight"] *= 4
        torch.save(state, self.weights)
        timm = self.work / "timm-resnet18"  # what timm calls a local-dir
        timm.mkdir()
        torch.save(state, timm / "pytorch_model.bin")
        seen = {"input_size": [3, self.img_size, self.img_size], "mean": MEAN, "std": STD, "num_classes": self.classes}
        about = {"architecture": "resnet18", "num_classes": self.classes, "pretrained_cfg": seen}
        (timm / "config.json").write_text(json.dumps(about))


@dataclass(frozen=True)
class Peer:
    """One way to do the job.

    Args:
        name: of the row.
        numbers: "float32" or "bf16".
        words: from a fresh output folder to script and arguments.
        commit: of a checkout that the user named, or None.
    """

    name: str
    numbers: str
    words: Callable[[Path], list[str]]
    commit: str | None = None

    @property
    def ours(self) -> bool:
        """Whether it is this project."""
        return self.name.startswith("ours")


def ours(job: Job, name: str, numbers: str, *more: str) -> Peer:
    """Return this project's command."""

    def words(output: Path) -> list[str]:
        typed = f"-a mobilenet_v2 --teacher-arch resnet18 --teacher-resume {job.weights} --distiller kd".split()
        typed += f"--img-size {job.img_size} -b {job.batch_size} --lr {job.lr} --output {output / 'run'}".split()
        return [str(ROOT / "classification" / "main_mgd.py"), str(job.folder), *typed, *more]

    return Peer(name, numbers, words)


def timm(job: Job, checkout: Path, name: str, numbers: str, *more: str) -> Peer:
    """Return the command of timm's training script; what its defaults add to the job (colours, smoothing) is off."""

    def words(output: Path) -> list[str]:
        typed = f"--model mobilenetv2_100 --kd-model-name local-dir:{job.work / 'timm-resnet18'} --kd-temperature 4"
        typed += f" --distill-loss-weight 1 --task-loss-weight 1 --num-classes {job.classes} --img-size {job.img_size}"
        typed += f" -b {job.batch_size} --lr {job.lr} --weight-decay 1e-4 --sched step --decay-epochs 1000"
        typed += " --warmup-epochs 0 --smoothing 0 --color-jitter 0 --train-interpolation bilinear --drop 0.2"
        typed += f" --device cpu --val-split valid --output {output}"
        return [str(checkout / "train.py"), "--data-dir", str(job.folder), *typed.split(), *more]

    return Peer(name, numbers, words, commit_of(checkout))


def trainer(job: Job, name: str, numbers: str, *more: str) -> Peer:
    """Return the command of the script for the Trainer of transformers, which stands beside this file."""

    def words(output: Path) -> list[str]:
        typed = f"--teacher {job.weights} --img-size {job.img_size} --batch-size {job.batch_size} --lr {job.lr}"
        return [str(HERE / "hugging_face.py"), str(job.folder), *typed.split(), "--output", str(output), *more]

    return Peer(name, numbers, words)


def torchdistill(job: Job, checkout: Path, name: str) -> Peer:
    """Return the command of torchdistill's script; it has no mixed precision."""

    def words(output: Path) -> list[str]:
        config = output / "job.yaml"
        output.mkdir(parents=True)
        filled = Template((HERE / "torchdistill.yaml").read_text().partition("\n")[2]).substitute(
            folder=job.folder,
            teacher=job.weights,
            output=output,
            classes=job.classes,
            img_size=job.img_size,
            batch_size=job.batch_size,
            lr=job.lr,
            workers=os.cpu_count(),
        )
        config.write_text(filled)
        script = checkout / "examples" / "torchvision" / "image_classification.py"
        return [str(script), "--config", str(config), "--device", "cpu"]

    return Peer(name, "float32", words, commit_of(checkout))


def commit_of(checkout: Path) -> str:
    """Return the commit of a checkout."""
    told = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or "unknown"
