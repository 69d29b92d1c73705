"""Copy photographs, shrunk and split for training: python scripts/prepare_photos.py FROM TO [--side 256] [--valid 0.1]

FROM holds CLASS folders, and a seeded tenth of each becomes TO/valid/CLASS, the others TO/train/CLASS; or it holds
train/ and valid/ (or val/) with CLASS folders, and the split stays. Copies are upright JPEG files with a short side of
`side` px at most: twice what the network sees is enough. Images that cannot be read are named and left out.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from classification.data import walk
from classification.errors import UserError
from classification.images import read_image

JPEG_SIDE = 65500  # px, of Pillow's encoder
SPLITS = {"train", "training", "valid", "val", "validation", "test", "testing"}


def plan(source: Path, valid: float, seed: int = 0) -> dict[Path, str]:
    """Return the split/CLASS of every image of `source`.

    Raises:
        UserError: there are no two class folders with images, half a split, or a class has one image to split.
    """
    folders = {path.name for path in source.iterdir() if path.is_dir() and path.name[0] != "."}
    held = next((name for name in ("valid", "val") if name in folders), "")
    if held and "train" in folders:
        placed = {
            path: f"{part}/{name}"
            for part, folder in (("train", "train"), ("valid", held))
            for name, paths in classes(source / folder).items()
            for path in paths
        }
    elif folders and {name.lower() for name in folders} <= SPLITS:
        names = " and ".join(sorted(folders))
        raise UserError(
            f"{source} holds {names}, not train and valid (or val) of CLASS folders; "
            "to have a part of one held back, give the folder that holds the CLASS folders"
        )
    else:
        placed = dict(pair for name, paths in classes(source).items() for pair in split(name, paths, valid, seed))
    found = sorted({Path(place).name for place in placed.values()})
    if len(found) < 2:
        what = f"images of {found[0]} alone" if found else f"no images ({', '.join(IMG_EXTENSIONS)})"
        raise UserError(f"{source} holds {what}: give the folder that holds the CLASS folders, two or more")
    return placed


def classes(top: Path) -> dict[str, list[Path]]:
    """List the images in each folder of `top`, at any depth, sorted."""
    found: dict[str, list[Path]] = {}
    for folder in sorted(path for path in top.iterdir() if path.is_dir() and path.name[0] != "."):
        files = sorted(Path(below, name) for below, names in walk(folder) for name in names if name[0] != ".")
        images = [path for path in files if path.suffix.lower() in IMG_EXTENSIONS]
        if left := len(files) - len(images):
            print(f"left out: {left} files of {folder} that are no images ({', '.join(IMG_EXTENSIONS)})")
        if images:
            found[folder.name] = images
    return found


def split(name: str, paths: list[Path], valid: float, seed: int) -> list[tuple[Path, str]]:
    """Draw the part `valid` of a class, one image at least and never all of them."""
    if len(paths) < 2:
        raise UserError(f"class {name} has one image, and needs one to train and one to validate: {paths[0]}")
    held = min(max(1, round(valid * len(paths))), len(paths) - 1)
    drawn = set(random.Random(b"%d " % seed + os.fsencode(name)).sample(paths, held))
    return [(path, f"{'valid' if path in drawn else 'train'}/{name}") for path in paths]


def shrink(path: Path, target: Path, side: int) -> None:
    """Write an upright copy whose short side is at most `side` px."""
    image = read_image(str(path))
    scale = side / min(image.size)
    if scale < 1:
        width, height = (round(scale * length) for length in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)
    if max(image.size) > JPEG_SIDE:
        raise UserError(f"image {path} cannot be written: a side of {max(image.size)} px is more than JPEG has")
    image.save(target, quality=95)


def prepare(source: Path, folder: Path, side: int, valid: float) -> list[str]:
    """Copy all into `folder`, which appears when it is complete; return what is said of each that cannot be read."""
    placed = plan(source, valid)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as beside:
        top = Path(beside) / "photos"
        for place in set(placed.values()):
            (top / place).mkdir(parents=True)
        # Two folders of a class, or two formats, may have a name in common: numbers tell them apart.
        targets = [top / place / f"{path.stem[:60]}-{n}.jpg" for n, (path, place) in enumerate(placed.items())]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            said = list(pool.map(partial(attempt, side=side), placed, targets))
        top.rename(folder)
    return [why for why in said if why]


def attempt(path: Path, target: Path, *, side: int) -> str:
    """Copy one image; return why it cannot be read, or nothing."""
    try:
        shrink(path, target, side)
    except UserError as error:
        return str(error)
    return ""


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FROM")
    parser.add_argument("folder", type=Path, metavar="TO")
    parser.add_argument("--side", type=int, default=256, help="longest short side of a copy, px")
    parser.add_argument("--valid", type=float, default=0.1, help="part of each class that is held back to validate")
    args = parser.parse_args(words)
    if not args.source.is_dir():
        sys.exit(f"{args.source} is no folder")
    if args.folder.exists():
        sys.exit(f"{args.folder} exists already")
    if args.side < 1 or not 0 < args.valid < 1:
        sys.exit("--side is a number of pixels, --valid a part between 0 and 1")
    try:
        said = prepare(args.source, args.folder, args.side, args.valid)
    except UserError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{args.folder} cannot be written ({error.strerror})")
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names that are no text
    for why in said:
        print(f"left out: {why}")
    for part in ("train", "valid"):
        count, kinds = (sum(1 for _ in (args.folder / part).glob(depth)) for depth in ("*/*", "*"))
        print(f"{part}: {count} images of {kinds} classes")


if __name__ == "__main__":
    main()
