"""Kill scoring, selection, stored teachers and the four steps, and compare: python scripts/kill_pile.py [--kills 25]

Makes small images, scores them and trains on them once without a kill. Then each command is started again and again,
and gets SIGKILL after a drawn time, with all its processes, until it ends by itself. In the end shards, lists and
weights must be the same, bit for bit, and no shard may have been written twice. `--only reinforce,cached` kills these
alone: storing a teacher's outputs, and training from them.
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
SHARE = {"semi": 0.35, "score": 0.25, "select": 0.1, "reinforce": 0.15, "cached": 0.15}  # of the kills
SMALL = "-a cifar_resnet8_w0.5 --teacher-arch cifar_resnet8 --img-size 16 -b 9 -j 0 --teacher-epochs 3"
EPOCHS = "--pretrain-epochs 2 --finetune-epochs 1 -- --train-crop pad --checkpoint-every-steps 3"
STORED = "--samples 40 --shard-size 2 -b 8 -j 1 --mixup 0.4"
CACHED = "-a cifar_resnet8_w0.5 --distiller kd -b 5 -j 0 --epochs 12 --seed 0 --checkpoint-every-steps 1 --lr 0.05"


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
    stored = ["--output", f"{folder}/cache", *STORED.split()]
    cached = ["--output", f"{folder}/cached", "--resume", "auto", *CACHED.split()]
    return {
        "semi": command("semi_supervised.py", "photos", "--unlabelled", "pile", "--output", f"{folder}/semi", *semi),
        "score": command("pseudo_label.py", "score", "whole/semi/teacher/best.pth", "pile", *shards),
        "select": command("pseudo_label.py", "select", f"{folder}/scores", *chosen),
        "reinforce": command("reinforce.py", "whole/semi/teacher/best.pth", "photos", *stored),
        "cached": command("main_mgd.py", "photos", "--teacher-cache", f"{folder}/cache", *cached),
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
        if path.suffix in (".parquet", ".txt", ".npy"):
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
    parser.add_argument("--only", default=",".join(SHARE), help="commands to kill, comma-separated (all)")
    args = parser.parse_args()
    share = {what: SHARE[what] for what in args.only.split(",")}
    drawn = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_images(root, pile=240)
        for folder in ("whole", "killed"):
            (root / folder).mkdir()
        # The teacher of all others comes from "semi".
        lines = {what: words for what, words in commands("whole").items() if what == "semi" or what in share}
        seconds = {what: run(words, root, None)[1] for what, words in lines.items()}
        kills: dict[str, int] = dict.fromkeys(share, 0)
        times: dict[Path, int] = {}
        for what in share:
            while kills[what] < args.kills * share[what] / sum(share.values()):
                ended, _ = run(commands("killed")[what], root, drawn.uniform(0.1, 0.9) * min(seconds[what], 20))
                kills[what] += not ended
                if ended:  # nothing is left to do
                    break
                for shard in (root / "killed").rglob("*.parquet"):
                    written = shard.stat().st_mtime_ns
                    assert times.setdefault(shard, written) == written, f"{shard} was written twice"
            run(commands("killed")[what], root, None)
        whole, killed = (found(root / folder) for folder in ("whole", "killed"))
        whole = {path: digest for path, digest in whole.items() if "semi" in share or not path.startswith("semi")}
        different = [path for path in whole if whole[path] != killed.get(path)]
        print(json.dumps({"kills": sum(kills.values()), **kills, "files": len(whole), "different": different}))
        if different or len(killed) != len(whole):
            sys.exit(1)


if __name__ == "__main__":
    main()
