"""Make the small CIFAR-10 of the quality table: python scripts/prepare_cifar10.py ARCHIVE FOLDER [--per-class 1000]

ARCHIVE is cifar10.tar.xz, CIFAR-10 as files cifar10/{train,valid}/CLASS/NNNN.jpg. FOLDER receives all of valid/, and of
each class of train/ the first `per-class` images in the fixed order of cifar10_order.txt (a seeded permutation).
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
from pathlib import Path

ORDER = Path(__file__).parent / "cifar10_order.txt"


def prepare(archive: Path, folder: Path, per_class: int) -> None:
    """Unpack the chosen images into `folder`; it appears when it is complete, or stays where another made it first."""
    chosen: set[str] = set()
    for line in ORDER.read_text().splitlines():
        label, *numbers = line.split()
        chosen |= {f"cifar10/train/{label}/{number}.jpg" for number in numbers[:per_class]}
    folder.parent.mkdir(parents=True, exist_ok=True)
    found = 0
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside, tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and (member.name in chosen or "/valid/" in member.name):
                found += member.name in chosen
                tar.extract(member, beside, filter="data")
        if found < len(chosen):
            sys.exit(f"{archive} lacks {len(chosen) - found} of the images that {ORDER.name} names")
        try:
            (Path(beside) / "cifar10").rename(folder)
        except OSError:  # not empty: another process made it meanwhile
            if not folder.exists():
                raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-class", type=int, default=1000)
    args = parser.parse_args()
    if args.folder.exists():
        sys.exit(f"{args.folder} exists already")
    prepare(args.archive, args.folder, args.per_class)


if __name__ == "__main__":
    main()
