"""Make the small CIFAR-10 of the quality table: python scripts/prepare_cifar10.py ARCHIVE FOLDER [--per-class 1000]

ARCHIVE is cifar10.tar.xz, CIFAR-10 as files cifar10/{train,valid}/CLASS/NNNN.jpg. FOLDER receives all of valid/, and of
each class of train/ the first `per-class` images in the fixed order of cifar10_order.txt (a seeded permutation). With
--held-out N, its valid/ is made of the next N images per class of that order instead: settings are chosen on these,
and reported on the real valid/.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
from pathlib import Path

ORDER = Path(__file__).parent / "cifar10_order.txt"


def prepare(archive: Path, folder: Path, per_class: int, held_out: int = 0) -> None:
    """Unpack the chosen images into `folder`; it appears when it is complete, or stays where another made it first."""
    chosen: dict[str, str] = {}  # by name in the archive, the part that it belongs to
    for line in ORDER.read_text().splitlines():
        label, *numbers = line.split()
        for place, number in enumerate(numbers[: per_class + held_out]):
            chosen[f"cifar10/train/{label}/{number}.jpg"] = "train" if place < per_class else "valid"
    folder.parent.mkdir(parents=True, exist_ok=True)
    found = 0
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside, tarfile.open(archive) as tar:
        for member in tar:
            part = chosen.get(member.name) or ("valid" if "/valid/" in member.name and not held_out else None)
            if member.isfile() and part:
                found += member.name in chosen
                member.name = f"cifar10/{part}/{'/'.join(member.name.split('/')[2:])}"
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
    parser.add_argument("--held-out", type=int, default=0, metavar="N", help="valid/: the next N training images")
    args = parser.parse_args()
    if args.folder.exists():
        sys.exit(f"{args.folder} exists already")
    prepare(args.archive, args.folder, args.per_class, args.held_out)


if __name__ == "__main__":
    main()
