"""Check tar shards: python scripts/check_shards.py [--images 100000]

Writes tiny images in ten shards to a temporary folder, then
1. finds and reads all of them once, in order, and compares each with what was written;
2. trains on the beginning of them, kills the run at a drawn instant until it ends, and compares the weights, bit for
   bit, with those of a run without a kill;
3. trains on the same in two ranks, and compares which images each read.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from classification.data.folders import read_folder
from classification.data.image_files import file_digest
from classification.data.inference import read_batches
from classification.data.preprocessing import Preprocessing

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "classification" / "main_base.py"
SHARDS = 10
TRAINED = 600  # images of the runs that are killed
SMALL = "-a cifar_resnet8_w0.5 --img-size 16 -b 20 -j 2 --seed 0 --train-crop pad --epochs 2 --checkpoint-every-steps 3"
WATCHING = f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
from classification import main_base
from classification.data import loading
real = loading.read_image
def read(path):
    with open(os.path.join({{folder!r}}, os.environ["RANK"]), "a") as file:
        file.write(path + chr(10))
    return real(path)
loading.read_image = read
sys.exit(main_base.main(sys.argv[1:]))
"""


def picture(number: int) -> bytes:
    """Draw an image of 8 px."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "jpeg")
    return file.getvalue()


def write(folder: Path, images: int, shards: int) -> list[str]:
    """Write shards of images of ten classes; return the digest of each image."""
    folder.mkdir(parents=True)
    digests = []
    for shard, numbers in enumerate(np.array_split(np.arange(images), shards)):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for number in numbers.tolist():
                content = picture(number)
                digests.append(hashlib.blake2b(content).hexdigest()[:32])
                for kind, part in (("jpg", content), ("cls", b"%d" % (number % 10))):
                    info = tarfile.TarInfo(f"{number:07d}.{kind}")
                    info.size = len(part)
                    tar.addfile(info, io.BytesIO(part))
    return digests


def check_reading(root: Path, images: int) -> None:
    """Find and read all images in order."""
    digests = write(root / "train", images, SHARDS)
    write(root / "valid", 100, 1)
    begun = time.perf_counter()
    samples = read_folder(root).train
    found = time.perf_counter() - begun
    assert [label for _, label in samples] == [number % 10 for number in range(images)]
    begun, count = time.perf_counter(), 0
    for batch in read_batches([path for path, _ in samples], Preprocessing.of(8, "pad"), 100, 2):
        count += len(batch.paths)
        assert not batch.unreadable
    read = time.perf_counter() - begun
    assert count == images and [file_digest(path) for path, _ in samples] == digests
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"{images} images in {SHARDS} shards: found in {found:.1f} s, read in order at {images / read:.0f} images/s")
    print(f"each one is what was written; peak memory {peak:.0f} MB", flush=True)


def command(root: Path, output: Path) -> list[str]:
    """Return the words of a training that resumes what is in its folder."""
    return [str(root), *SMALL.split(), "--output", str(output), "--resume", "auto"]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Return the last weights of a run."""
    state: dict[str, torch.Tensor] = torch.load(output / "last.pth", weights_only=True)["state_dict"]
    return state


def check_resuming(root: Path, draw: random.Random) -> None:
    """Kill a training again and again."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, SCRIPT, *command(root, root / "whole")], check=True, stdout=subprocess.DEVNULL)
    seconds, kills = time.perf_counter() - begun, 0
    while True:
        words = [sys.executable, str(SCRIPT), *command(root, root / "killed")]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            status = process.wait(seconds * draw.uniform(0.3, 0.8) if kills < 5 else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert status == 0, status
        break
    one, other = weights(root / "whole"), weights(root / "killed")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    print(f"{kills} kills of a training on {TRAINED} images: the same weights, bit for bit", flush=True)


def check_ranks(root: Path) -> None:
    """Train in two ranks, and compare what each read."""
    folder = root / "read"
    folder.mkdir()
    (root / "watching.py").write_text(WATCHING.format(folder=str(folder)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*launch, str(root / "watching.py"), *command(root, root / "ranks"), "--epochs", "1"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    parts = [
        Counter(line for line in (folder / str(rank)).read_text().splitlines() if "/train/" in line)
        for rank in range(2)
    ]
    assert not parts[0].keys() & parts[1].keys() and set((parts[0] + parts[1]).values()) == {1}
    assert sum(parts[0].values()) + sum(parts[1].values()) == TRAINED
    counts = " and ".join(str(part.total()) for part in parts)
    print(f"two ranks read {counts} images of an epoch of {TRAINED}: none twice, none left out")


def main() -> None:
    """Run the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the instants of the kills")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check_reading(Path(folder, "large"), args.images)
        root = Path(folder, "small")
        write(root / "train", TRAINED, 3)
        write(root / "valid", 50, 1)
        check_resuming(root, random.Random(args.seed))
        check_ranks(root)


if __name__ == "__main__":
    main()
