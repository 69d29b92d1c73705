"""What the Trainer of transformers gains from a teacher: python scripts/bench_huggingface.py DIR CHECKPOINT

A MobileNet-V2 of transformers (half width, fresh weights) learns from the photographs of DIR, read by `datasets`: alone
by transformers' own Trainer, by KD as the tutorial has it, and by cross-entropy + KD + MGD on taps that are found, both
by `DistillationTrainer`. CHECKPOINT is the teacher, a run folder's file or a .pth of ours. Each run appends a record to
results/huggingface.jsonl; runs with a record are left out, except with --only. The last record of a run counts. --table
prints the records as a table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from cells import differences
from torchvision.transforms import v2

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results" / "huggingface.jsonl"
RECIPES: dict[str, str] = {
    "alone": "transformers' Trainer, alone",
    "tutorial": "DistillationTrainer, temperature 5, lambda_param 0.5",
    "mgd": "DistillationTrainer, ce + kd + mgd on found taps",
}


def read_photographs(folder: Path, side: int) -> Any:
    """Return the data set, with random crops and flips for training and a centre crop for evaluation."""
    from datasets import load_dataset

    photos = load_dataset("imagefolder", data_dir=str(folder))
    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    train = v2.Compose([v2.RandomResizedCrop(side, antialias=True), v2.RandomHorizontalFlip(), *last])
    valid = v2.Compose([v2.Resize(round(side / 0.875), antialias=True), v2.CenterCrop(side), *last])

    def using(transform: Any) -> Any:
        def prepare(batch: dict[str, Any]) -> dict[str, Any]:
            pixels = [transform(image.convert("RGB")) for image in batch["image"]]
            return {"pixel_values": pixels, "labels": batch["label"]}

        return prepare

    return photos["train"].with_transform(using(train)), photos["validation"].with_transform(using(valid))


def make_trainer(recipe: str, photos: Any, teacher: Any, seed: int, args: argparse.Namespace, folder: str) -> Any:
    """Return the trainer of a recipe: the student starts from the same weights in all recipes of a seed."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, Trainer, TrainingArguments, set_seed

    import mgd
    from mgd.huggingface import DistillationTrainer, accuracy_and_f1
    from mgd.losses import KD, ChannelMatching

    train, valid = photos
    names = train.features["label"].names
    if teacher.classes != names:
        sys.exit(f"the teacher's classes are {teacher.classes}, those of the photographs {names}")
    set_seed(seed)
    config = MobileNetV2Config(depth_multiplier=0.5, image_size=args.img_size)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    student = MobileNetV2ForImageClassification(config)
    options = TrainingArguments(
        folder,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        seed=seed,
        eval_strategy="epoch",
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    shared = {"args": options, "train_dataset": train, "eval_dataset": valid, "compute_metrics": accuracy_and_f1}
    if recipe == "alone":
        return Trainer(model=student, **shared)
    seen = teacher.preprocessing
    frozen = mgd.freeze(teacher.network, mgd.View([0.5] * 3, [0.5] * 3, seen.mean, seen.std))
    how: dict[str, Any] = {"temperature": 5, "lambda_param": 0.5}
    if recipe == "mgd":
        terms = {"ce": 1, "kd": (KD.Hyper(temperature=1.5), 1), "mgd": (ChannelMatching.Hyper(form="relative"), 16)}
        how = {"terms": terms}
    return DistillationTrainer(student_model=student, teacher_model=frozen, **how, **shared)


def read_records() -> dict[tuple[str, int], dict[str, Any]]:
    """Return the last record of each run, by recipe and seed."""
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    return {(record["recipe"], record["seed"]): record for record in map(json.loads, lines)}


def table() -> str:
    """Return the records as a table, differences to the student alone paired by seed."""
    records = list(read_records().values())
    found = {name: {r["seed"]: r["accuracy"] for r in records if r["recipe"] == name} for name in RECIPES}
    lines = ["| | top-1 %, last epoch | n | difference, paired by seed |", "|---|---|---|---|"]
    for name, row in RECIPES.items():
        values = list(found[name].values())
        if values:
            top1 = f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
            pairs = [found[name][seed] - found["alone"][seed] for seed in found[name] if seed in found["alone"]]
            gain = differences(pairs) if pairs and name != "alone" else ""
            lines.append(f"| {row} | {top1} | {len(values)} | {gain} |")
    about = sorted({(r["transformers"], r["versions"]["torch"]) for r in records})
    for pair in about:
        commits = {r["commit"][:8] for r in records if (r["transformers"], r["versions"]["torch"]) == pair}
        where = f"at commit {', '.join(sorted(commits))}"
        lines += ["", f"Measured on CPU cores, transformers {pair[0]}, torch {pair[1]}, {where}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("teacher", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--img-size", type=int, default=96)
    parser.add_argument("--only", nargs="+", choices=RECIPES, help="these, even where a record exists")
    parser.add_argument("--table", action="store_true", help="print the records as a table")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    if not (args.data and args.teacher):
        parser.error("name the folder of photographs and the teacher's checkpoint")
    import transformers

    from classification.models.trained import open_trained
    from classification.options.config import describe

    about = describe([], {})
    done = () if args.only else read_records()
    photos = read_photographs(args.data, args.img_size)
    for seed in range(args.seeds):
        for recipe in args.only or RECIPES:
            if (recipe, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                trainer = make_trainer(recipe, photos, open_trained(args.teacher), seed, args, folder)
                begun = time.perf_counter()
                trainer.train()
                measured = trainer.evaluate()
            record = {
                "recipe": recipe,
                "seed": seed,
                "accuracy": 100 * measured["eval_accuracy"],
                "f1": 100 * measured["eval_f1"],
                "seconds": time.perf_counter() - begun,
                "img_size": args.img_size,
                "epochs": args.epochs,
                "threads": torch.get_num_threads(),
                "transformers": transformers.__version__,
                **{name: about[name] for name in ("versions", "machine", "commit")},
            }
            with RECORDS.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
