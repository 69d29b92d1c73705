"""Measure what int8 costs a network: python scripts/bench_int8.py CHECKPOINT DIR --arch NAME --train-crop pad

Post-training quantisation by every calibration method with weights of 8 and 7 bits, then --int8-epochs, for which the
network guides itself (`kd`), on several seeds. Each cell is compared with CHECKPOINT on all of DIR/valid, and its
record is appended to results/int8.jsonl when it is done. This can be killed and started again: cells that have a
record are kept, a run that was cut is resumed. `--table` prints the records as a table, and does nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from classification import main_mgd
from classification.data.preprocessing import Preprocessing
from classification.data.trial import Trial, read_trial
from classification.models import exporting, fidelity, quantised, rounding
from classification.models.trained import Trained, open_trained
from classification.system.new_files import write

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results" / "int8.jsonl"
BATCH = 100
CALIBRATION = 256, 8  # images, and those of a batch


def measure(
    trained: Trained,
    trial: Trial,
    done: set[str],
    keep: Callable[[str, fidelity.Fidelity], None],
    train_seed: Callable[[int], Path],
    seeds: int,
) -> None:
    """Do the cells that are missing.

    Args:
        trained: the float network.
        trial: its images.
        done: the cells that have a record.
        keep: takes a cell and what was found.
        train_seed: trains with --int8-epochs, and returns the run folder.
        seeds: their number.
    """
    batches = list(trial.batches(BATCH))
    before = exporting.torch_runtime(trained)
    logits = [before(pixels) for pixels, _ in batches]
    said = exporting.description(trained, takes_bytes=False)
    prepare = exporting.input_function(trained, takes_bytes=False)

    def compare(content: bytes) -> fidelity.Fidelity:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder, "int8.onnx"), content)
            after = exporting.file_runtime(Path(folder, "int8.onnx"), "int8", trained)
        known = iter(logits)
        return fidelity.compare(lambda _: next(known), after, batches)

    images: list[Tensor] = [prepare(batch) for batch in trial.calibration(*CALIBRATION)]
    model = exporting.to_onnx(trained)
    for method in quantised.METHODS:
        for bits in (8, 7):
            if (cell := f"post-training, {method}, weights of {bits} bits") not in done:
                content = quantised.to_int8(model, images, said, method=method, reduce_range=bits == 7)
                keep(cell, compare(content))
    for seed in range(seeds):
        if (cell := f"int8-epochs, seed {seed}") not in done:
            learned = open_trained(train_seed(seed) / "best.pth")
            scales = rounding.learned_scales(learned)
            keep(cell, compare(quantised.to_int8(exporting.to_onnx(learned), images[:1], said, scales=scales)))


def train(args: argparse.Namespace, seed: int) -> Path:
    """Train, or resume, one seed with --int8-epochs, and return its folder."""
    folder: Path = args.work / f"seed-{seed}"
    epochs = str(args.epochs)
    words = [args.data, "-a", args.arch, "--student-resume", args.checkpoint, "--train-crop", args.train_crop]
    words += ["--teacher-arch", args.arch, "--teacher-resume", args.checkpoint, "--distiller", "kd"]
    words += ["--img-size", str(args.img_size), "--epochs", epochs, "--int8-epochs", epochs, "--lr", str(args.lr)]
    words += ["--lr-schedule", "cosine", "-b", str(args.batch_size), "-j", "0", "--seed", str(seed)]
    if status := main_mgd.main([*words, "--output", str(folder), "--resume", "auto"]):
        sys.exit(status)
    return folder


def read_records() -> list[dict[str, Any]]:
    """Return the records."""
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def table() -> str:
    """Return the records as a table."""
    lines = ["| network | int8 | float top-1, % | int8 top-1, % | change, 95 % interval | agreement, % | images |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for record in read_records():
        low, high = record["interval"]
        change = f"{record['after'] - record['before']:+.2f} ({low:+.2f} to {high:+.2f})"
        cells = [f"`{record['arch']}`", record["cell"], f"{record['before']:.2f}", f"{record['after']:.2f}", change]
        lines.append(f"| {' | '.join([*cells, format(record['agreement'], '.2f'), str(record['images'])])} |")
    machines = dict.fromkeys(f"{record['instructions']}; {record['versions']}" for record in read_records())
    return "\n".join([*lines, "", *machines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--table", action="store_true", help="print the records as a table")
    parser.add_argument("--arch", default="cifar_resnet56")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--train-crop", choices=("resized", "pad"), default="pad")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.0005, help="with fixed norms, rates must be small")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "int8", help="run folders")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    if not (args.checkpoint and args.data):
        parser.error("name the checkpoint and the folder of images")
    trained = open_trained(args.checkpoint, args.arch)
    trained = replace(trained, preprocessing=Preprocessing.of(args.img_size, args.train_crop))
    trial = read_trial(args.data, trained.preprocessing, trained.classes, trained.num_classes, calibrate=True)

    def keep(cell: str, found: fidelity.Fidelity) -> None:
        before, after = found.top1()
        shares = {"interval": found.interval(), "agreement": 100 * found.agree / found.images, "images": found.images}
        record = {"arch": args.arch, "cell": cell, "before": before, "after": after, **shares}
        record |= {"instructions": quantised.instruction_set(), "versions": exporting.package_versions("int8")}
        with RECORDS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{cell}: {before:.2f} -> {after:.2f}", flush=True)

    done = {record["cell"] for record in read_records() if record["arch"] == args.arch}
    measure(trained, trial, done, keep, partial(train, args), args.seeds)


if __name__ == "__main__":
    main()
