"""Beside what else one could use: python scripts/bench_peers.py FOLDER --timm CHECKOUT --torchdistill CHECKOUT

One job: mobilenet_v2 learns from a ResNet-18 by cross-entropy + KD (T 4, equal weights), SGD with Nesterov momentum,
random crops and flips, from the same photographs, in each project by the command that its documentation names: this
one, timm's train.py, the Trainer of transformers (scripts/peers/hugging_face.py), torchdistill's script. All run in
alternation, with the loading processes that each has by default, and stop after the same number of steps. A checkout is
a clone of the project's repository; without one, that project is left out. lightly-train is not among them: it distils
features without labels, and has no loss on logits.

Each run is checked: full batches, at every step loss = cross-entropy + KD of the teacher's and student's outputs, the
two differ, and the loss falls. Measured from outside (scripts/peers/watch.py): images per second (median over windows
of steps, the first steps left out), peak memory of the process, seconds from the command to the end of the first step.
Writes results/speed*/peers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from peers.commands import ROOT, Job, Peer, ours, timm, torchdistill, trainer
from results_table import TableError
from side_by_side import RESULTS, Seconds, alternate, keep, question

from classification.data.folders import read_folder
from classification.errors import UserError

SKIP, WINDOW = 8, 4  # steps left out at the beginning: until then the loaders' queues are full; and those of a window
LONGEST = 600  # seconds of a run
NUMBERS = {"float32": 1e-3, "bf16": 2e-2}  # by number type, the relative error of a loss: some compute it in bf16


@dataclass(frozen=True)
class Found:
    """One run of one peer.

    Args:
        rate: images per second.
        start: seconds from the command to the end of the first step.
        start_cpu: of these, seconds that the process computed.
        log: what scripts/peers/watch.py noted.
    """

    rate: float
    start: float
    start_cpu: float
    log: dict[str, Any]


def peers(job: Job, checkouts: argparse.Namespace) -> list[Peer]:
    """Return what is compared; the fastest one of others counts, so they have their fast options, too."""
    cores = str(os.cpu_count())
    found = [
        ours(job, "ours", "float32", "--teacher-dtype", "float32"),
        ours(job, "ours, by default: the teacher in bfloat16", "float32"),
        ours(job, "ours, --amp bf16", "bf16", "--amp", "bf16"),
    ]
    if version_of("transformers") and version_of("accelerate") and version_of("datasets"):
        more = ("--workers", cores)
        found.append(trainer(job, "Trainer", "float32"))
        found.append(trainer(job, f"Trainer, {cores} loading processes", "float32", *more))
        found.append(trainer(job, f"Trainer, bf16, {cores} loading processes", "bf16", *more, "--bf16"))
    else:
        print("the Trainer is left out: pip install transformers accelerate datasets")
    if checkouts.timm:
        half, layout = ("--amp", "--amp-dtype", "bfloat16"), "--channels-last"
        found.append(timm(job, checkouts.timm, "timm", "float32"))
        found.append(timm(job, checkouts.timm, "timm --channels-last", "float32", layout))
        found.append(timm(job, checkouts.timm, "timm --channels-last, bfloat16", "bf16", layout, *half))
    else:
        print("timm is left out: clone huggingface/pytorch-image-models, and name the folder by --timm")
    if checkouts.torchdistill and version_of("torchdistill"):
        found.append(torchdistill(job, checkouts.torchdistill, "torchdistill"))
    else:
        print(
            "torchdistill is left out: pip install torchdistill, clone yoshitomo-matsubara/torchdistill, and name the "
            "folder by --torchdistill"
        )
    return found


def version_of(package: str) -> str | None:
    """Return the version of a package, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run(peer: Peer, job: Job, steps: int, threads: int) -> Found:
    """Run a peer for `steps` steps.

    Raises:
        SystemExit: it failed, took too long, or did another job.
    """
    output = Path(tempfile.mkdtemp(dir=job.work))
    log = output / "steps.json"
    watch = [str(ROOT / "scripts" / "peers" / "watch.py"), str(log), str(steps), str(job.classes)]
    changed = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    changed["HF_DATASETS_CACHE"] = str(job.work / "datasets")
    with (output / "said.txt").open("w") as said:
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *watch, *peer.words(output / "out")],
            cwd=output,
            env={**os.environ, **changed},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            sys.exit(f"{peer.name} took more than {LONGEST} s: lower --steps, or wait until the machine is quiet")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its loading processes, whose parent has left
    if not log.exists():
        last = (output / "said.txt").read_text()[-2000:]
        sys.exit(f"{peer.name} ended with status {process.returncode} and no record of its steps:\n{last}")
    found = json.loads(log.read_text())
    check(peer, found, job.batch_size)
    ends = [step["seconds"] for step in found["steps"]]
    return Found(rate(ends, job.batch_size), ends[0] - start, found["steps"][0]["cpu"], found)


def rate(ends: Sequence[float], batch_size: int) -> float:
    """Return images per second: the median over windows, from the times at which steps ended."""
    marks = ends[SKIP - 1 :: WINDOW]
    return median(WINDOW * batch_size / (b - a) for a, b in pairwise(marks))


def check(peer: Peer, log: dict[str, Any], batch_size: int) -> None:
    """Refuse a run that did another job.

    Raises:
        SystemExit: it says what differs.
    """
    steps = log["steps"]
    if set(log["batches"]) != {batch_size}:
        sys.exit(f"{peer.name}: batches of {sorted(set(log['batches']))} images, expected {batch_size}")
    for number, step in enumerate(steps, start=1):
        if None in step.values():
            sys.exit(f"{peer.name}, step {number}: no teacher, cross-entropy or loss was seen: {step}")
        loss, ce, kd = step["loss"], step["ce"], step["kd"]
        if abs(loss - ce - kd) > NUMBERS[peer.numbers] * loss + 1e-3:
            sys.exit(f"{peer.name}, step {number}: the loss is {loss}, expected ce + kd = {ce} + {kd}")
    if all(abs(step["kd"] - step["ce"]) < 1e-3 for step in steps):
        sys.exit(f"{peer.name}: KD and cross-entropy are the same: does the teacher see the images?")
    last = [step["loss"] for step in steps[-(len(steps) // 3) :]]
    if not sum(last) / len(last) < steps[0]["loss"]:
        sys.exit(f"{peer.name}: the loss does not fall: {steps[0]['loss']:.3f}, at the end {sum(last) / len(last):.3f}")


def measure(job: Job, chosen: Sequence[Peer], options: argparse.Namespace) -> dict[str, list[Found]]:
    """Run all in alternation, as many rounds as the time allows, at least two."""
    found: dict[str, list[Found]] = {peer.name: [] for peer in chosen}

    def way(peer: Peer) -> Seconds:
        got = run(peer, job, options.steps, options.threads)
        found[peer.name].append(got)
        print(f"{peer.name:45} {got.rate:7.1f} images/s, first step after {got.start:5.1f} s", flush=True)
        return Seconds(1 / got.rate)

    ways = {peer.name: lambda peer=peer: way(peer) for peer in chosen}
    begun = time.monotonic()
    alternate(ways, 1, warmup=0)
    fit = int(60 * options.minutes / (time.monotonic() - begun)) if options.rounds is None else options.rounds
    alternate(ways, max(2, fit) - 1, warmup=0)
    return found


def row_of(peer: Peer, runs: Sequence[Found]) -> dict[str, Any]:
    """Return what is kept of a peer: medians over rounds, and the rates of each."""
    low, middle, high = quantiles([run.rate for run in runs], n=4, method="inclusive")
    return {
        "name": peer.name,
        "numbers": peer.numbers,
        "commit": peer.commit,
        "workers": max(run.log["workers"] for run in runs),
        "threads": runs[0].log["threads"],
        "images_per_second": middle,
        "quartiles": [low, high],
        "each": [run.rate for run in runs],
        "first_step_seconds": median(run.start for run in runs),
        "first_step_cpu_seconds": median(run.start_cpu for run in runs),
        "peak_bytes": median(run.log["peak_bytes"] for run in runs),
        "bytes_with_workers": median(run.log["bytes_with_workers"] for run in runs),
    }


def questions(chosen: Sequence[Peer], found: dict[str, list[Found]]) -> list[dict[str, Any]]:
    """Return rows of the speed table: ours against the fastest other one, by number type."""
    seconds = {name: [1 / run.rate for run in runs] for name, runs in found.items()}
    rows = []
    for numbers in NUMBERS:
        others = [peer.name for peer in chosen if peer.numbers == numbers and not peer.ours]
        if not others:
            continue
        fastest = min(others, key=lambda name: median(seconds[name]))
        for peer in (peer for peer in chosen if peer.ours and peer.numbers == numbers):
            what = f"training, {numbers}: {peer.name} / {fastest}"
            rows.append(question(what, seconds, fastest, peer.name, "1.2"))
    return rows


def table(file: Path = RESULTS.parent / "speed" / "peers.json") -> str:
    """Return the table of the documentation.

    Raises:
        TableError: there is no record.
    """
    if not file.exists():
        raise TableError(f"there is no {file}: run python scripts/bench_peers.py")
    record = json.loads(file.read_text())
    columns = ("", "images/s", "quartiles", "first step, s", "peak memory, MiB", "loading processes")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for numbers in NUMBERS:
        for row in sorted(
            (r for r in record["peers"] if r["numbers"] == numbers), key=lambda r: -r["images_per_second"]
        ):
            middle = " to ".join(f"{value:.1f}" for value in row["quartiles"])
            lines.append(
                f"| {row['name']} ({numbers}) | {row['images_per_second']:.1f} | {middle} | "
                f"{row['first_step_seconds']:.1f} | {row['peak_bytes'] / 2**20:.0f} | {row['workers']} |"
            )
    ratios = [
        f"{row['what']}: {row['ratio']:.2f} ({' to '.join(f'{q:.2f}' for q in row['quartiles'])})"
        for row in record["rows"]
    ]
    return "\n".join([*lines, "", *(f"- {ratio}" for ratio in ratios), "", f"`{record['command']}`"])


def checkout(text: str) -> Path:
    """Return a folder that the user named, absolute."""
    path = Path(text).resolve()
    if not (path / "train.py").exists() and not (path / "examples" / "torchvision").exists():
        raise argparse.ArgumentTypeError(f"{text} is no checkout of timm or torchdistill: clone the repository there")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs: train/CLASS/*.jpg and valid/CLASS/*.jpg")
    parser.add_argument("--timm", type=checkout, help="checkout of huggingface/pytorch-image-models")
    parser.add_argument("--torchdistill", type=checkout, help="checkout of yoshitomo-matsubara/torchdistill")
    parser.add_argument("--img-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=SKIP + 6 * WINDOW, help="of a run")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process that trains")
    parser.add_argument("--minutes", type=float, default=13.0, help="for all rounds together")
    parser.add_argument("--rounds", type=int, help="instead of --minutes")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="peers whose names begin with a WORD")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # an exception, which ends the running peer, too
    try:
        images = read_folder(args.folder)
    except UserError as error:
        parser.error(str(error))
    if args.steps < SKIP + 2 * WINDOW:
        parser.error(f"--steps {args.steps}: expected at least {SKIP + 2 * WINDOW}")
    if args.steps * args.batch_size > len(images.train):
        parser.error(
            f"{args.steps} steps of {args.batch_size} images are more than an epoch of {len(images.train)}: "
            "lower --steps or --batch-size"
        )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        classes = len(images.classes)
        job = Job(args.folder.resolve(), Path(work), classes, args.img_size, args.batch_size)
        job.prepare()
        every = peers(job, args)
        chosen = [peer for peer in every if peer.name.startswith(tuple(args.only))]
        if not chosen:
            parser.error(f"--only {' '.join(args.only)}: expected the beginning of {'; '.join(p.name for p in every)}")
        found = measure(job, chosen, args)
    kept = {
        "img_size": args.img_size,
        "batch_size": args.batch_size,
        "steps": args.steps,
        "packages": {name: version_of(name) for name in ("transformers", "accelerate", "datasets", "torchdistill")},
        "peers": [row_of(peer, found[peer.name]) for peer in chosen],
        "rows": questions(chosen, found),
    }
    if args.only == [""]:
        keep("peers", kept)


if __name__ == "__main__":
    main()
