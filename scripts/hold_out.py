"""Take images out of train/ to choose settings on: python scripts/hold_out.py DATA FOLDER --per-class 40

FOLDER receives links: its valid/ holds the first `per-class` training images of each class of DATA, by name, and its
train/ the others. The real valid/ is not touched, so that it can be reported on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path


def hold_out(data: Path, folder: Path, per_class: int) -> None:
    """Link the training images of `data` into train/ and valid/ of a folder, which appears when it is complete.

    Raises:
        ValueError: a class would be left without a training image.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        new = Path(beside, "data")
        for label in sorted(path for path in (data / "train").iterdir() if path.is_dir()):
            images = sorted(label.iterdir())
            if len(images) <= per_class:
                raise ValueError(f"{label} has {len(images)} images: too few to hold {per_class} out")
            for part, chosen in (("valid", images[:per_class]), ("train", images[per_class:])):
                (new / part / label.name).mkdir(parents=True)
                for path in chosen:
                    (new / part / label.name / path.name).symlink_to(path.resolve())
        new.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-class", type=int, required=True, metavar="N", help="images to hold out")
    args = parser.parse_args()
    if args.folder.exists():
        sys.exit(f"{args.folder} exists already")
    try:
        hold_out(args.data, args.folder, args.per_class)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
