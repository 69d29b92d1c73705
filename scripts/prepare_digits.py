"""Write the handwritten digits inside scikit-learn as class folders: python scripts/prepare_digits.py FOLDER"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_digits(folder: Path, train_per_class: int, seed: int = 0) -> None:
    """Write `train_per_class` scans of each digit to train/ and all others to valid/, as 8 px PNG files."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    seen = dict.fromkeys(range(10), 0)
    for index in order:
        label = int(digits.target[index])
        split = "train" if seen[label] < train_per_class else "valid"
        seen[label] += 1
        path = folder / split / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
        Image.fromarray(grey).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train-per-class", type=int, default=30)
    args = parser.parse_args()
    write_digits(args.folder, args.train_per_class)
    print(f"wrote {args.folder}")


if __name__ == "__main__":
    main()
