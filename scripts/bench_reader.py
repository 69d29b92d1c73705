"""How fast are images read? python scripts/bench_reader.py FOLDER: our reader against torchvision's, in alternation.

torchvision: ImageFolder, RandomResizedCrop, flip, ToTensor, Normalize. Ours: `Photos`, bytes to the batch, normalised
there. Both in one process on one core, batches of 64 images of 224 px. Then the same with every image in memory
(--cache ram), and evaluation of one network by our engine against timm's loader and a plain inference loop. Before
anything is timed the evaluation's pixels must be torchvision's. Writes results/speed*/reader.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import timm
import torch
from side_by_side import alternate, keep, question
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision import transforms as T

from classification.data.cache import Cache
from classification.data.folders import read_folder
from classification.data.images import read_image
from classification.data.loading import FixedBatches, Photos, TrainBatches, make_loader
from classification.data.preprocessing import MEAN, STD, Preprocessing, normalise
from classification.data.transforms import train_transform
from classification.models import build
from classification.options.config import parse
from classification.runs.world import Seed, World
from classification.system.memory import keep_freed_memory
from classification.training.engine import Engine
from classification.training.precision import autocast
from classification.training.starting import start_job

CPU, SIZE, BATCH = torch.device("cpu"), 224, 64
Loader = DataLoader[tuple[Tensor, int, int]]


def theirs(root: Path, *, training: bool) -> DataLoader[tuple[Tensor, int]]:
    """torchvision's way, as in its reference scripts."""
    crop = [T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip()] if training else [T.Resize(256), T.CenterCrop(SIZE)]
    transform = T.Compose([*crop, T.ToTensor(), T.Normalize(MEAN, STD)])
    return DataLoader(datasets.ImageFolder(str(root), transform), BATCH, shuffle=training)


def ours(samples: list[tuple[str, int]], *, training: bool, cache: Cache | None = None) -> Loader:
    """Our way."""
    transform = train_transform(SIZE, "resized") if training else Preprocessing.of(SIZE).transform()
    photos = Photos(samples, transform, 0, cache)
    batches = TrainBatches(len(samples), BATCH, 0) if training else FixedBatches(list(range(len(samples))), BATCH)
    return make_loader(photos, batches, 0, CPU)


def batches(loading: Iterable[tuple[Tensor, ...]], num: int, ready: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Return what reads `num` batches."""

    def read() -> None:
        for number, batch in enumerate(loading, start=1):
            ready(batch[0])
            if number == num:
                return

    return read


def check(root: Path, samples: list[tuple[str, int]]) -> None:
    """Refuse to time two readers that differ."""
    expected, _ = next(iter(theirs(root, training=False)))
    got = normalise(next(iter(ours(samples, training=False)))[0])
    difference = (got - expected).abs()
    step = 1 / 255 / min(STD)
    assert difference.max() < 1.01 * step and (difference > 1e-5).float().mean() < 1e-4, "rounding alone may differ"


def evaluations(folder: Path, arch: str) -> dict[str, Callable[[], object]]:
    """Return an evaluation of one network by our engine, and by timm's loader with a plain loop."""
    with tempfile.TemporaryDirectory() as place:
        weights = Path(place) / "weights.pth"
        torch.save({"state_dict": build(arch, len(list((folder / "valid").iterdir()))).state_dict()}, weights)
        words = [str(folder), "-a", arch, "-b", str(BATCH), "-j", "1", "--amp", "bf16", "-e"]
        options = parse([*words, "--student-resume", str(weights)], "", distillation=False)
        engine = Engine(start_job(options, Seed(0, True), with_teacher=False), World())
    network = engine.job.student
    assert network is not None
    dataset = timm.data.create_dataset("", str(folder / "valid"))
    loading = timm.data.create_loader(
        dataset, (3, SIZE, SIZE), BATCH, use_prefetcher=False, interpolation="bilinear", crop_pct=0.875, num_workers=1,
        mean=MEAN, std=STD, device=CPU, persistent_workers=True,
    )  # fmt: skip
    found = {}

    @torch.inference_mode()
    def timm_loop() -> None:
        network.eval()
        right = 0
        for images, target in loading:
            with autocast("cpu", "bf16"):
                right += int((network(images.to(memory_format=torch.channels_last)).argmax(1) == target).sum())
        found["timm"] = 100 * right / len(dataset)

    def our_loop() -> None:
        found["ours"] = engine.evaluate(network)["valid_top1"]

    our_loop()
    timm_loop()
    assert abs(found["ours"] - found["timm"]) < 1.0, found  # of one image in 341, bf16 may differ
    return {"timm": timm_loop, "ours": our_loop}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs: train/CLASS/*.jpg and valid/CLASS/*.jpg")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=8, help="of a round")
    args = parser.parse_args()
    keep_freed_memory()  # as a run does; all ways gain by it
    samples = list(read_folder(args.folder).train)
    check(args.folder / "train", samples)
    print("the pixels of both readers agree", flush=True)
    seconds = alternate(evaluations(args.folder, "mobilenet_v1"), args.rounds)
    rows = [question("evaluation: timm's loader and loop / ours", seconds, "timm", "ours", "1")]
    torch.set_num_threads(1)
    cache = Cache(samples, read_image)
    ways = {
        "torchvision": batches(theirs(args.folder / "train", training=True), args.batches, lambda images: images),
        "files": batches(ours(samples, training=True), args.batches, normalise),
        "memory": batches(ours(samples, training=True, cache=cache), args.batches, normalise),
    }
    seconds = alternate(ways, args.rounds)
    rows.append(question("reading, one core: torchvision / ours", seconds, "torchvision", "files", "1.5"))
    rows.append(question("reading, one core: files / --cache ram", seconds, "files", "memory", "3"))
    rows.append(question("reading, one core: torchvision / --cache ram", seconds, "torchvision", "memory", ""))
    keep("reader", {"images": args.batches * BATCH, "rows": rows})


if __name__ == "__main__":
    main()
