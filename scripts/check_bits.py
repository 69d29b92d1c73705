"""Record what short runs compute, or compare it with a record: python scripts/check_bits.py FILE [--compare]

A change that moves code must leave every bit as it was. Six runs on the digits of scikit-learn and one that is killed
and resumed are reduced to their metrics (without times) and one digest per tensor of best.pth. Results depend on the
processor and on the versions of torch: record and compare on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from prepare_digits import write_digits

ROOT = Path(__file__).parents[1]
TIMES = ("images_per_second", "train_seconds", "match_seconds", "peak_memory_mib")
COMMON = "--img-size 16 --train-crop pad --hflip 0 -b 25 --lr 0.05 -p 1000 -j 0 --seed 3 --epochs 3 --cache ram"
PAIR = "-a cifar_resnet8_w0.5 --teacher-arch cifar_resnet8 --teacher-resume {teacher}"
RUNS = {
    "alone": ("main_base.py", "-a cifar_resnet8_w0.5 --lr-schedule cosine --warmup 1 --warmup-epochs 1"),
    "mgd-amp": ("main_mgd.py", f"{PAIR} --distiller mgd --mgd-reducer amp --loss-factor 1e3"),
    "mgd-rd-kd": (
        "main_mgd.py",
        f"{PAIR} --mgd-reducer rd --mgd-with-kd 1 --mgd-observe online --mgd-update-freq 1 --loss-factor 1e3",
    ),
    "ofd-flow": ("main_mgd.py", f"{PAIR} --distiller ofd --term ofd.init=flow"),
    "dml": ("main_mgd.py", "-a cifar_resnet8_w0.5 --distiller dml --teacher-arch cifar_resnet8_w0.5"),
    "meal": (
        "main_mgd.py",
        "-a cifar_resnet8_w0.5 --teacher-arch cifar_resnet8,cifar_resnet8 --teacher-resume {teacher},{other} "
        "--distiller meal --ema 0.9 --mixup 0.2 --accumulate 2",
    ),
}
RESUMED = ("main_mgd.py", f"{RUNS['mgd-rd-kd'][1]} --checkpoint-every-steps 3 --resume auto")


def launch(script: str, options: str, data: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start a run on one thread."""
    words = [str(data), *shlex.split(options), *shlex.split(COMMON), "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "classification" / script), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run that must end well."""
    if process.wait():
        sys.exit(f"{shlex.join(map(str, process.args))} ended with status {process.returncode}")  # type: ignore[arg-type]


def kill_inside_an_epoch(process: subprocess.Popen[bytes], last: Path) -> None:
    """Send SIGKILL as soon as a checkpoint of the middle of an epoch is there."""
    while process.poll() is None:
        if last.exists() and torch.load(last, weights_only=True)["resume"]["step"]:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.02)
    sys.exit("the run ended before it could be killed inside an epoch")


def describe(run: Path) -> dict[str, Any]:
    """Return the metrics without times, and one digest per tensor of best.pth."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tensors = torch.load(run / "best.pth", weights_only=True)["state_dict"]
    digests = {
        name: hashlib.sha256(value.reshape(-1).contiguous().view(torch.uint8).numpy()).hexdigest()
        for name, value in tensors.items()
    }
    return {"metrics": [{k: v for k, v in line.items() if k not in TIMES} for line in lines], "best": digests}


def run_all(work: Path) -> dict[str, Any]:
    """Train two teachers, then every run; return what each computed."""
    data = work / "digits"
    write_digits(data, 20)
    teachers = {name: work / name for name in ("teacher", "other")}
    for seed, folder in enumerate(teachers.values()):
        finish(launch("main_base.py", f"-a cifar_resnet8 --momentum 0.{8 + seed}", data, folder))
    files = {name: folder / "best.pth" for name, folder in teachers.items()}
    for name, (script, options) in RUNS.items():
        finish(launch(script, options.format(**files), data, work / name))
    script, options = RESUMED
    kill_inside_an_epoch(launch(script, options.format(**files), data, work / "resumed"), work / "resumed" / "last.pth")
    finish(launch(script, options.format(**files), data, work / "resumed"))
    return {name: describe(work / name) for name in (*RUNS, "resumed")}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name every run, metric and tensor that differs."""
    found = []
    for name, run in before.items():
        for old, new in zip(run["metrics"], after[name]["metrics"], strict=True):
            keys = sorted(key for key in set(old) | set(new) if old.get(key) != new.get(key))
            found += [f"{name}: epoch {old['epoch']}, {key}: {old.get(key)} -> {new.get(key)}" for key in keys]
        tensors = set(run["best"]) | set(after[name]["best"])
        changed = sorted(t for t in tensors if run["best"].get(t) != after[name]["best"].get(t))
        found += [f"{name}: best.pth differs in {len(changed)} tensors, as {changed[0]}"] if changed else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON file of the record")
    parser.add_argument("--compare", action="store_true", help="compare with the record instead of writing it")
    args = parser.parse_args()
    if args.compare and not args.file.is_file():
        sys.exit(f"there is no record {args.file}: make one first, without --compare")
    with tempfile.TemporaryDirectory() as work:
        measured = run_all(Path(work))
    if not args.compare:
        args.file.write_text(json.dumps(measured, indent=1) + "\n")
        print(f"recorded {len(measured)} runs in {args.file}")
    elif found := differences(json.loads(args.file.read_text()), measured):
        sys.exit("\n".join(found))
    else:
        print(f"{len(measured)} runs: metrics and weights are equal, bit for bit")


if __name__ == "__main__":
    main()
