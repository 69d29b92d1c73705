"""How long until work begins? python scripts/bench_start.py FOLDER: from the command to the first images evaluated.

The command distils mobilenet_v1 from a ResNet-50 whose weights a file holds (made here, untrained); it ends before the
first forward of the initial evaluation. Writes results/speed*/start.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from side_by_side import keep

from classification.models import build

LEAVE = """
import os, sys
from classification import main_mgd
from classification.training.engine import Engine
images = Engine.images
def leave(self, *batch, **how):
    images(self, *batch, **how)
    os._exit(42)
Engine.images = leave
sys.exit(main_mgd.main(sys.argv[1:]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs: train/CLASS/*.jpg and valid/CLASS/*.jpg")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    seconds = []
    with tempfile.TemporaryDirectory() as work:
        classes = len([path for path in (args.folder / "train").iterdir() if path.is_dir()])
        weights = Path(work) / "teacher.pth"
        torch.save(build("resnet50", classes).state_dict(), weights)
        for number in range(args.rounds):
            command = [
                sys.executable,
                "-c",
                LEAVE,
                str(args.folder),
                "-a",
                "mobilenet_v1",
                "--teacher-arch",
                "resnet50",
            ]
            command += ["--teacher-resume", str(weights), "--output", f"{work}/{number}"]
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            seconds.append(time.perf_counter() - start)
            assert done.returncode == 42, done.stderr
    row = {"what": "seconds from the command to the first forward", "seconds_each": seconds, "seconds": median(seconds)}
    print(f"{row['what']}: {row['seconds']:.1f}")
    keep("start", {"rows": [{**row, "target": "under 12"}]})


if __name__ == "__main__":
    main()
