"""How long until the first step on a million files, and how much memory? python scripts/bench_listing.py

Makes a folder of 1000 classes in the temporary folder, hard links of a tiny JPEG per class, and removes it in the end.
main_base.py trains on it as one process and as gloo ranks, with one loading process per rank, twice in the same run
folder: `new` begins the run, `again` resumes it by --resume auto. --before adds the same for the code of a commit.
Memory is the proportional set size (Linux): of pages that processes share each counts its part. Writes
results/speed*/listing.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from side_by_side import keep

ROOT = Path(__file__).parents[1]
CLASSES = 1000
OPTIONS = shlex.split("-a cifar_resnet8_w0.5 --img-size 32 -b 64 --seed 0 --lr 0.01 --epochs 1 --resume auto")
CHILD = """
import json, os, sys, time
from pathlib import Path
from classification import main_base
from classification.training.step import Stepper
file, steps, done, step = sys.argv.pop(1), int(sys.argv.pop(1)), [], Stepper._step

def size(process):
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))

def children(process):
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()

def now():
    own = os.getpid()
    return {"rank": size(own), "workers": [size(child) for child in children(own)]}

def counted(self, *inputs):
    done.append(1)
    if len(done) == 1:
        self.found = {"first": time.time(), "cpu": time.process_time(), "memory": now()}
    if len(done) == steps:
        self.found["later"] = now()
        Path(file).write_text(json.dumps(self.found))
        os._exit(0)
    return step(self, *inputs)

Stepper._step = counted
sys.exit(main_base.main())
"""


def make_folder(top: Path, num: int) -> None:
    """Link `num` images of train, and 10 of valid per class."""
    random = np.random.default_rng(0)
    for number in range(CLASSES):
        name = f"n{number:08d}"
        for part, count in (("train", num // CLASSES), ("valid", 10)):
            folder = top / part / name
            folder.mkdir(parents=True)
            first = str(folder / f"{name}_0.JPEG")
            Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(first, "JPEG")
            for other in range(1, count):
                os.link(first, f"{folder}/{name}_{other}.JPEG")


def start(code: Path, photos: Path, run: Path, ranks: int, steps: int) -> dict[str, Any]:
    """Start ranks, and return what the slowest or largest of them measured."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    words = [str(photos), *OPTIONS, "-j", str(ranks), "--output", str(run)]
    begun, started, files = time.time(), [], []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        env = {**os.environ, **(own if ranks > 1 else {}), "MASTER_PORT": port}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(code)}
        files.append(run.with_name(f"{run.name}-{rank}.json"))
        command = [sys.executable, "-c", CHILD, str(files[-1]), str(steps), *words]
        started.append(subprocess.Popen(command, env=env, cwd=code, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    errors = [process.communicate(timeout=1800)[1] for process in started]
    if any(not file.exists() for file in files):
        raise RuntimeError(b"\n".join(errors).decode())
    found = [json.loads(file.read_text()) for file in files]
    for file in files:
        file.unlink()
    return {
        "seconds": max(one["first"] for one in found) - begun,
        "cpu_seconds_per_rank": [round(one["cpu"], 2) for one in found],
        "rank_bytes": max(one["memory"]["rank"] for one in found),
        "worker_bytes": max([0, *(size for one in found for size in one["memory"]["workers"])]),
        "rank_bytes_later": max(one["later"]["rank"] for one in found),
        "worker_bytes_later": max([0, *(size for one in found for size in one["later"]["workers"])]),
    }


def checkout(commit: str, folder: Path) -> Path:
    """Unpack the code of a commit."""
    folder.mkdir()
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed, check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000, help="of train")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=200, help="after which memory is measured again")
    parser.add_argument("--before", metavar="COMMIT", help="also measure the code of this commit")
    args = parser.parse_args()
    top = Path(tempfile.mkdtemp(prefix="bench-listing-"))
    try:
        codes = {"before": checkout(args.before, top / "before")} if args.before else {}
        codes["now"] = checkout("HEAD", top / "now")
        begun = time.perf_counter()
        make_folder(top / "photos", args.images)
        print(f"{args.images} hard links in {time.perf_counter() - begun:.0f} s", flush=True)
        time.sleep(3)
        rows = []
        for ranks in args.ranks:
            for name, code in codes.items():
                for when in ("new", "again"):
                    run = top / f"{name}-{ranks}"
                    row = {"code": name, "ranks": ranks, "start": when}
                    row |= start(code, top / "photos", run, ranks, args.steps)
                    rows.append(row)
                    sizes = {k: f"{v / 2**20:.0f} MiB" for k, v in row.items() if re.search("bytes", k)}
                    print(
                        row["code"],
                        ranks,
                        when,
                        f"{row['seconds']:.1f} s",
                        row["cpu_seconds_per_rank"],
                        sizes,
                        flush=True,
                    )
        keep("listing", {"images": args.images, "classes": CLASSES, "starts": rows})
    finally:
        shutil.rmtree(top)


if __name__ == "__main__":
    main()
