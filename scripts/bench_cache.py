"""How fast is training without the teacher? python scripts/bench_cache.py: a ResNet-50's outputs stored, or computed.

Steps of a small network at 224 px, the images read from files: on labels alone, with `kd` of the teacher itself, and
with `kd` of its stored outputs, in alternation in one process. Before anything is timed, the stored outputs must give
the loss that the teacher gives on the same views. Time is that of the processor, which other programs change little;
with one thread it is that of the clock on a machine that does nothing else. Writes results/speed*/cache.json.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from side_by_side import Seconds, alternate, keep, question

from classification import reinforce
from classification.data.preprocessing import Preprocessing
from classification.models import build
from classification.options.config import parse
from classification.runs.checkpoint import describe_student
from classification.runs.world import Seed, World
from classification.system.memory import keep_freed_memory
from classification.training import alone, distilling
from classification.training.engine import Engine
from classification.training.step import Loaded
from classification.training.trainer import Trainer

CLASSES = [f"class{number}" for number in range(10)]  # all of which are stored, so that losses can be compared


def write_images(root: Path, number: int) -> None:
    """Write JPEG files of 256 px: smooth noise, which takes as long to decode as a photograph."""
    rng = np.random.default_rng(0)
    for split, count in (("train", number), ("valid", len(CLASSES))):
        for index in range(count):
            folder = root / split / CLASSES[index % len(CLASSES)]
            folder.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            small.resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg", quality=90)


def write_teacher(path: Path) -> None:
    """Save a ResNet-50 that has not learned anything, with logits that differ from image to image."""
    torch.manual_seed(0)
    network = build("resnet50", len(CLASSES))
    with torch.no_grad():
        network.train()(torch.randn(8, 3, 224, 224))  # statistics of its norms
        network.fc.weight *= 20  # type: ignore[operator, union-attr]
    torch.save(describe_student(network.state_dict(), "resnet50", len(CLASSES), CLASSES, Preprocessing()), path)


def trainer_of(words: list[str], *, distils: bool) -> Trainer:
    """Build a run as its command does."""
    options = parse(words, "", distillation=distils)
    job = (distilling if distils else alone).prepare(options, Seed(0, typed=True))
    trainer = Trainer(Engine(job, World()))
    trainer.stepper.wrapped.train()
    return trainer


def batches(trainer: Trainer) -> Iterator[tuple[int, Loaded]]:
    """Yield the batches of one epoch after another."""
    for epoch in itertools.count():
        trainer.batches.begin(epoch)
        for batch in trainer.loader:
            yield epoch, batch


def steps(trainer: Trainer, number: int) -> Callable[[], Seconds]:
    """Return what does some steps of a run, reading included, and measures itself."""
    source = batches(trainer)

    def work() -> Seconds:
        start = time.process_time()
        for epoch, batch in itertools.islice(source, number):
            trainer.stepper(batch, epoch, 1, len(batch[0]))
        return Seconds(time.process_time() - start)

    return work


def check(stored: Trainer, online: Trainer) -> tuple[float, float]:
    """Refuse to time stored outputs that give another loss than the teacher; return both losses."""
    stored.batches.begin(0)
    images, target, index, *said = next(iter(stored.loader))
    with torch.no_grad():
        found = float(stored.stepper.forward(images, target, index, 0, stored=said)["kd"])
        want = float(online.stepper.forward(images, target, index, 0)["kd"])
    rough = online.job.teacher_dtype != "float32"
    assert abs(found - want) < (0.1 if rough else 0.01) * abs(want), (found, want)
    return found, want


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="of a round")
    parser.add_argument("-b", "--batch-size", type=int, default=16)
    parser.add_argument("--students", default="mobilenet_v1,timm:mobilenetv3_small_100", help="comma-separated")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_images(root / "photos", 4 * args.batch_size)
        write_teacher(root / "teacher.pth")
        storing = [str(root / "teacher.pth"), str(root / "photos"), "--output", str(root / "cache"), "--samples", "2"]
        assert reinforce.main([*storing, "-j", "0", "-b", "8"]) == 0
        found = [measure(root, student, args) for student in args.students.split(",")]
    rows = [row for part in found for row in part["rows"]]
    keep("cache", {"batch_size": args.batch_size, "steps": args.steps, "threads": 1, "students": found, "rows": rows})


def measure(root: Path, student: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return losses, steps per second and rows of the speed table for one student."""
    size = [str(root / "photos"), "--img-size", "224", "-b", str(args.batch_size), "-j", "0", "--lr", "0.001"]
    size += ["--amp", "bf16", "-a", student]
    stored, teacher = (["--distiller", "kd", *more] for more in (
        ["--teacher-cache", str(root / "cache")], ["--teacher-resume", str(root / "teacher.pth")]
    ))  # fmt: skip
    folder = root / student.replace(":", "-")
    trainers = {
        "labels": trainer_of([*size, "--output", str(folder / "labels")], distils=False),
        "online": trainer_of([*size, "--output", str(folder / "online"), *teacher], distils=True),
        "stored": trainer_of([*size, "--output", str(folder / "stored"), *stored], distils=True),
    }
    losses = check(trainers["stored"], trainers["online"])
    print(f"kd of stored outputs {losses[0]:.4f}, of the teacher on the same views {losses[1]:.4f}", flush=True)
    seconds = alternate({way: steps(trainer, args.steps) for way, trainer in trainers.items()}, args.rounds)
    rows = [
        question(f"{student}, ResNet-50 teacher, a step: computed / stored", seconds, "online", "stored", "2"),
        question(f"{student}, a step: stored outputs / labels", seconds, "stored", "labels", "at most 1.05"),
    ]
    rate = {way: args.steps / median(times) for way, times in seconds.items()}
    print({way: round(value, 3) for way, value in rate.items()}, "steps per second of processor time", flush=True)
    return {"student": student, "kd": losses, "steps_per_second": rate, "rows": rows}


if __name__ == "__main__":
    main()
