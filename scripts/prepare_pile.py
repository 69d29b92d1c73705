"""Make images without labels for scripts/unlabelled.yaml: a folder `pile`, and for photographs a small labelled folder.

python scripts/prepare_pile.py ARCHIVE PILE --per-class 200 [--photographs DIR --labelled FOLDER]

ARCHIVE is cifar10.tar.xz. Without --photographs, PILE receives all of its training images that prepare_cifar10.py does
not choose with the same --per-class, under numbers that say nothing of their class. With it, --labelled FOLDER receives
links to `per-class` training images of each class of DIR and to all of DIR/valid; PILE receives links to the other
training images and as many foreign ones: images of ARCHIVE, enlarged to 128 px. Both are drawn with a fixed seed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from PIL import Image
from prepare_cifar10 import ORDER

SIDE = 128  # pixels of an enlarged image


def archive_images(archive: Path, left_out: set[str]) -> Iterator[bytes]:
    """Yield the training images of the archive in its order, except those that are left out."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and "/train/" in member.name and member.name not in left_out:
                file = tar.extractfile(member)
                assert file is not None
                yield file.read()


def chosen_images(per_class: int) -> set[str]:
    """Return the names in the archive of the labelled images."""
    lines = (line.split() for line in ORDER.read_text().splitlines())
    return {f"cifar10/train/{label}/{number}.jpg" for label, *numbers in lines for number in numbers[:per_class]}


def write_cifar10(archive: Path, pile: Path, per_class: int) -> int:
    """Write the images that have no label, shuffled, and return their number."""
    images = list(archive_images(archive, chosen_images(per_class)))
    random.Random(0).shuffle(images)
    for number, content in enumerate(images):
        (pile / f"{number:05}.jpg").write_bytes(content)
    return len(images)


def write_photographs(archive: Path, folder: Path, labelled: Path, pile: Path, per_class: int) -> int:
    """Link labelled and other photographs, write as many foreign images as the others, and return the pile's size."""
    others: list[Path] = []
    for label in sorted(path for path in (folder / "train").iterdir() if path.is_dir()):
        images = sorted(label.iterdir())
        random.Random(label.name).shuffle(images)
        (labelled / "train" / label.name).mkdir(parents=True)
        for path in images[:per_class]:
            (labelled / "train" / label.name / path.name).symlink_to(path.resolve())
        others += images[per_class:]
    (labelled / "valid").symlink_to((folder / "valid").resolve())
    random.Random(0).shuffle(others)
    for number, path in enumerate(others):
        (pile / f"photograph-{number:05}{path.suffix}").symlink_to(path.resolve())
    foreign = list(archive_images(archive, set()))
    for number, content in enumerate(random.Random(1).sample(foreign, len(others))):
        image = Image.open(BytesIO(content)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.save(pile / f"foreign-{number:05}.jpg", quality=95)
    return 2 * len(others)


def make(
    archive: Path, pile: Path, per_class: int, photographs: Path | None = None, labelled: Path | None = None
) -> int:
    """Make the folders, which appear when they are complete, and return the number of images without labels."""
    pile.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=pile.parent) as beside:
        new, few = Path(beside, "pile"), Path(beside, "labelled")
        new.mkdir()
        if photographs and labelled:
            number = write_photographs(archive, photographs, few, new, per_class)
            few.rename(labelled)
        else:
            number = write_cifar10(archive, new, per_class)
        new.rename(pile)
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("pile", type=Path)
    parser.add_argument("--per-class", type=int, required=True, metavar="N")
    parser.add_argument("--photographs", type=Path, metavar="DIR")
    parser.add_argument("--labelled", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if (args.photographs is None) != (args.labelled is None):
        parser.error("--photographs and --labelled belong together")
    for folder in filter(None, (args.pile, args.labelled)):
        if folder.exists():
            sys.exit(f"{folder} exists already")
    print(make(args.archive, args.pile, args.per_class, args.photographs, args.labelled))


if __name__ == "__main__":
    main()
