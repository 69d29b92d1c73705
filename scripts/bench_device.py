"""Measure what goes to a device: python scripts/bench_device.py FOLDER

FOLDER is that of `make demo`. Teacher, students alone and distilled students are written as ONNX files, and the
distilled ones as int8 files too, calibrated on the training images. Accuracy is that on all of valid/; latency the
median of one image at a time, all files in alternation, by onnxruntime on one thread. Writes results/device.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from side_by_side import RESULTS

from classification.data.trial import Trial, read_trial
from classification.models import cost, exporting, quantised
from classification.models.trained import Trained, open_trained
from classification.options.config import describe
from classification.system.new_files import write

CALIBRATION = 200, 25  # images, and those of a batch
SECONDS = 20


def files_of(folder: Path, work: Path, trial: Trial) -> list[tuple[str, int, Path, Trained]]:
    """Write the files; return role, seed, file and network of each."""
    found: list[tuple[str, int, Path, Trained]] = []
    for run in sorted(path for path in folder.iterdir() if (path / "last.pth").exists()):
        role, _, seed = run.name.partition("-")
        trained = open_trained(run / "last.pth")
        model = exporting.to_onnx(trained)
        kinds = {role: model}
        if role == "distilled":
            prepare = exporting.input_function(trained, takes_bytes=False)
            images = [prepare(batch) for batch in trial.calibration(*CALIBRATION)]
            said = exporting.description(trained, takes_bytes=False)
            kinds["distilled, int8"] = quantised.to_int8(model, images, said)
        for kind, content in kinds.items():
            path = work / f"{run.name}-{len(found)}.onnx"
            write(path, content)
            found.append((kind, int(seed or 0), path, trained))
    return found


def measure(folder: Path, work: Path) -> list[dict[str, Any]]:
    """Return top-1, bytes and latency of every file."""
    first = open_trained(folder / "teacher" / "last.pth")
    trial = read_trial(folder / "data", first.preprocessing, first.classes, first.num_classes, calibrate=True)
    batches = list(trial.batches(100))
    rows, calls = [], list[Callable[[], object]]()
    for role, seed, path, trained in files_of(folder, work, trial):
        runtime = exporting.file_runtime(path, "onnx", trained)
        right = sum(int((runtime(images).argmax(1) == target).sum()) for images, target in batches)
        count = sum(len(target) for _, target in batches)
        rows.append({"role": role, "seed": seed, "top1": 100 * right / count, "bytes": path.stat().st_size})
        calls.append(partial(runtime.compute, runtime.prepare(batches[0][0][:1])))
    for row, milliseconds in zip(rows, cost.median_times(calls, seconds=SECONDS, max_calls=2000), strict=True):
        row["latency_ms"] = milliseconds
        print(f"{row['role']:16} {row['top1']:6.2f} % {row['bytes']:10,} bytes {milliseconds:8.3f} ms", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of make demo")
    args = parser.parse_args()
    if not (args.folder / "teacher" / "last.pth").exists():
        sys.exit(f"{args.folder} is not a folder of make demo: it has no teacher/last.pth")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        rows = measure(args.folder, Path(work))
    about = {key: value for key, value in describe([], {}).items() if key not in ("options", "command", "folder")}
    about["instructions"] = quantised.instruction_set()
    content = {"command": f"python scripts/bench_device.py {args.folder.name}", **about, "rows": rows}
    (RESULTS.parent / "device.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
