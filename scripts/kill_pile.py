"""Kill scoring, selection and the four steps again and again, and compare: python scripts/kill_pile.py [--kills 25]

Makes small images, scores them and trains on them once without a kill. Then each command is started again and again,
and gets SIGKILL after a drawn time, with all its processes, until it ends by itself. In the end shards, lists and
weights must be the same, bit for bit, and no shard may have been written twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SCRIPTS = Path(__file__).parents[1] / "classification"
CLASSES = ("bar", "dot", "sky")
SMALL = "-a cifar_resnet8_w0.5 --teacher-arch cifar_resnet8 --img-size 16 -b 9 -j 0 --teacher-epochs 3"
EPOCHS = "--pretrain-epochs 2 --finetune-epochs 1 -- --train-crop pad --checkpoint-every-steps 3"


def picture(label: int, rng: np.random.Generator) -> Image.Image:
    """Draw an image of a class: a bar, a dot, or a blue upper half."""
    pixels = rng.integers(0, 60, (16, 16, 3))
    top = rng.integers(2, 10)
    if label == 2:
        pixels[:8, :, 2] += 150
    else:
        pixels[top : top + 4, top if label else 0 : top + 5 if label else 16] += 150
    return Image.fromarray(pixels.astype(np.uint8))


def write_images(root: Path, pile: int) -> None:
    """Write photos/ with labels and pile/ without."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 5), ("valid", 4)):
        for label, name in enumerate(CLASSES):
            (root / "photos" / split / name).mkdir(parents=True)
            for index in range(number):
                picture(label, rng).save(root / "photos" / split / name / f"{index}.png")
    (root / "pile").mkdir()
    for index in range(pile):
        picture(index % 3, rng).save(root / "pile" / f"{index}.png")


def command(script: str, *words: str) -> list[str]:
    """Return a command of this project."""
    return [sys.executable, str(SCRIPTS / script), *words]


def commands(folder: str) -> dict[str, list[str]]:
    """Return the commands, each of which writes into `folder`."""
    shards = ["--output", f"{folder}/scores", "--shard-size", "20", "-b", "5", "-j", "1"]
    chosen = ["--top-k", "50", "--force", "--output", f"{folder}/chosen.txt"]
    semi = [*SMALL.split(), *EPOCHS.split()]
    return {
        "semi": command("semi_supervised.py", "photos", "--unlabelled", "pile", "--output", f"{folder}/semi", *semi),
        "score": command("pseudo_label.py", "score", "whole/semi/teacher/best.pth", "pile", *shards),
        "select": command("pseudo_label.py", "select", f"{folder}/scores", *chosen),
    }


def run(words: list[str], root: Path, most: float | None) -> tuple[bool, float]:
    """Run a command, and kill it with all its processes after `most` seconds; return whether it ended, and seconds."""
    start = time.monotonic()
    process = subprocess.Popen(
        words, cwd=root, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = process.communicate(timeout=most)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return False, time.monotonic() - start
    if process.returncode:
        sys.exit(f"{' '.join(words)} ended with status {process.returncode}:\n{said[-2000:]}")
    return True, time.monotonic() - start


def found(folder: Path) -> dict[str, str]:
    """Return digests of what was made: shards, lists without their folder's name, weights."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix in (".parquet", ".txt"):
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "last.pth":
            state = torch.load(path, weights_only=True)["state_dict"]
            parts = b"".join(value.numpy().tobytes() for value in state.values())
            digests[name] = hashlib.sha256(parts).hexdigest()
    return digests


def main() -> None:
    """Run everything once in peace, then under fire."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    drawn = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_images(root, pile=240)
        for folder in ("whole", "killed"):
            (root / folder).mkdir()
        seconds = {what: run(words, root, None)[1] for what, words in commands("whole").items()}
        kills: dict[str, int] = dict.fromkeys(seconds, 0)
        share = {"score": 0.4, "semi": 0.45, "select": 0.15}
        times: dict[Path, int] = {}
        for what in ("semi", "score", "select"):
            while kills[what] < args.kills * share[what]:
                ended, _ = run(commands("killed")[what], root, drawn.uniform(0.1, 0.9) * min(seconds[what], 20))
                kills[what] += not ended
                if ended:  # nothing is left to do
                    break
                for shard in (root / "killed").rglob("*.parquet"):
                    written = shard.stat().st_mtime_ns
                    assert times.setdefault(shard, written) == written, f"{shard} was written twice"
            run(commands("killed")[what], root, None)
        whole, killed = (found(root / folder) for folder in ("whole", "killed"))
        different = [path for path in whole if whole[path] != killed.get(path)]
        print(json.dumps({"kills": sum(kills.values()), **kills, "files": len(whole), "different": different}))
        if different or len(killed) != len(whole):
            sys.exit(1)


if __name__ == "__main__":
    main()
