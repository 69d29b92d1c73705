"""Copy photographs, shrunk and split for training: python scripts/prepare_photos.py FROM TO [--side 256] [--valid 0.1]

FROM holds CLASS folders, and a seeded tenth of each becomes TO/valid/CLASS, the others TO/train/CLASS; or it holds
train/ and valid/ (or val/) with CLASS folders, and the split stays. Copies are upright JPEG files with a short side of
`side` px at most: twice what the network sees is enough. Images that cannot be read are named and left out, and so are
hidden files and folders. Files whose bytes are the same are one image: they come to the same side of the split.
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

from classification.data.image_files import SUFFIXES, LeftOut, class_names, count_of, find_images, identical
from classification.data.images import has_heif, is_heif, read_image
from classification.errors import UserError, one_line

JPEG_SIDE = 65500  # px, of Pillow's encoder
SPLITS = {"train", "training", "valid", "val", "validation", "test", "testing"}
Images = dict[str, list[Path]]  # of each class


def plan(source: Path, valid: float, seed: int = 0) -> tuple[dict[Path, str], list[str]]:
    """Return the split/CLASS of every image of `source`, and what is to be said of it.

    Raises:
        UserError: there are no two class folders with images, half a split, a class without images, or a class has one
            image to split.
    """
    left = LeftOut()
    folders = set(class_names(source, LeftOut()))
    held = next((name for name in ("valid", "val") if name in folders), "")
    if held and "train" in folders:
        parts = {"train": classes(source / "train", left), "valid": classes(source / held, left)}
        if unknown := sorted(set(parts["valid"]) - set(parts["train"])):
            raise UserError(f"{source / held} has classes that {source / 'train'} lacks: {', '.join(unknown[:5])}")
        found, notes = sorted(set().union(*parts.values())), shared(parts)
        notes += [f"left out {source / name}: of folders beside train nothing is copied but {held}"
                  for name in sorted(folders - {"train", held})]  # fmt: skip
    elif folders and {name.lower() for name in folders} <= SPLITS:
        names = " and ".join(sorted(folders))
        raise UserError(
            f"{source} holds {names}, not train and valid (or val) of CLASS folders; "
            "to have a part of one held back, give the folder that holds the CLASS folders"
        )
    else:
        images, parts = classes(source, left), {}
        found = sorted(images)
        for name, paths in images.items():
            if len(paths) < 2:
                raise UserError(f"class {name} has one image, and needs one to train and one to validate: {paths[0]}")
    if len(found) < 2:
        loose = f"{count_of(len(left.loose), 'image')} beside its folders, and no CLASS folders" if left.loose else ""
        what = f"images of {found[0]} alone" if found else loose or f"no images ({', '.join(SUFFIXES)})"
        raise UserError(f"{source} holds {what}: give the folder that holds the CLASS folders, two or more")
    if not parts:
        parts, notes = split(images, valid, seed)
    placed = {path: f"{part}/{name}" for part in parts for name, paths in parts[part].items() for path in paths}
    if not has_heif() and (heif := [path for path in placed if is_heif(path.name)]):
        raise UserError(f"{count_of(len(heif), 'image')} in HEIC, as {heif[0]}: `pip install pillow-heif` to read them")
    return placed, [*left.notes(), *notes]


def classes(top: Path, left: LeftOut) -> Images:
    """List the images in each folder of `top`, at any depth, sorted; add what is left out to `left`.

    Raises:
        UserError: a class folder has no images.
    """
    found: Images = {}
    for name in class_names(top, left):
        beside = LeftOut()
        found[name] = sorted(Path(folder, file) for folder, files in find_images(top / name, beside) for file in files)
        if not found[name]:
            but = f" but {contents}" if (contents := beside.contents()) else ""
            raise UserError(f"{top / name} holds no images{but}: remove it, or add images ({', '.join(SUFFIXES)})")
        left.add(beside)
    return found


def shared(parts: dict[str, Images]) -> list[str]:
    """Return what is to be said where both sides of a split that is there hold an image."""
    side = {str(path): part for part in parts for paths in parts[part].values() for path in paths}
    groups = identical(side, lambda group: len({side[path] for path in group}) > 1)
    if not groups:
        return []
    count, first = count_of(len(groups), "image"), groups[0][0]
    other = next(path for path in groups[0] if side[path] != side[first])
    return [f"warning: {count} both in train and in valid, as {first} = {other}: the split stays"]


def split(images: Images, valid: float, seed: int) -> tuple[dict[str, Images], list[str]]:
    """Draw the part `valid` of each class, one image at least and never all; files of the same bytes are one image."""
    owners = {str(path): name for name, paths in images.items() for path in paths}
    groups = identical(owners)
    original = {Path(path): Path(group[0]) for group in groups for path in group}
    side: dict[Path, str] = {}  # of each image that is drawn
    for name, paths in images.items():
        ones = list(dict.fromkeys(original.get(path, path) for path in paths))
        if len(ones) < 2:
            raise UserError(
                f"class {name} has copies of one image, and needs one to train and one to validate: {ones[0]}"
            )
        draw(name, ones, valid, seed, side)
    parts = {
        part: {
            name: [path for path in paths if side[original.get(path, path)] == part] for name, paths in images.items()
        }
        for part in ("train", "valid")
    }
    return parts, copied(groups, owners)


def draw(name: str, ones: list[Path], valid: float, seed: int, side: dict[Path, str]) -> None:
    """Set the side of the images of a class that other classes have not set."""
    free = [path for path in ones if path not in side]
    held = min(max(1, round(valid * len(ones))), len(ones) - 1) - sum(side.get(path) == "valid" for path in ones)
    drawn = set(random.Random(b"%d " % seed + os.fsencode(name)).sample(free, min(max(held, 0), len(free))))
    side |= {path: "valid" if path in drawn else "train" for path in free}
    for part in ("train", "valid"):
        if all(side[path] != part for path in ones):
            raise UserError(
                f"class {name} has too few images that no other class has: none is left for {part}; remove the copies "
                f"from one of the classes, as {ones[0]}"
            )


def copied(groups: list[list[str]], owners: dict[str, str]) -> list[str]:
    """Return what is to be said of files that hold the same image."""
    said = []
    if groups:
        count, pair = f"{sum(map(len, groups))} files hold {count_of(len(groups), 'image')}", " = ".join(groups[0][:2])
        said.append(f"{count}, byte for byte, as {pair}: all files of an image are on one side of the split")
    if two := [group for group in groups if len({owners[path] for path in group}) > 1]:
        other = next(path for path in two[0] if owners[path] != owners[two[0][0]])
        said.append(f"warning: {count_of(len(two), 'image')} in more than one class, as {two[0][0]} = {other}")
    return said


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
    """Copy all into `folder`, which appears when it is complete; return what is to be said.

    Raises:
        UserError: as `plan` and `without_empty`.
    """
    placed, notes = plan(source, valid)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as beside:
        top = Path(beside) / "photos"
        for place in set(placed.values()):
            (top / place).mkdir(parents=True)
        # Two folders of a class, or two formats, may have a name in common: numbers tell them apart.
        targets = [top / place / f"{path.stem[:60]}-{n}.jpg" for n, (path, place) in enumerate(placed.items())]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            said = list(pool.map(partial(attempt, side=side), placed, targets))
        notes += without_empty(top, sorted(set(placed.values())))
        top.rename(folder)
    return [*notes, *(f"left out: {why}" for why in said if why)]


def without_empty(top: Path, places: list[str]) -> list[str]:
    """Remove the classes of valid of which no image could be read; return what is to be said.

    Raises:
        UserError: a class of train is left without images.
    """
    empty = [place for place in places if not any((top / place).iterdir())]
    if lost := [name for part, _, name in (place.partition("/") for place in empty) if part == "train"]:
        raise UserError(
            f"no image of {', '.join(lost[:5])} that was drawn for train can be read: mend or remove the broken ones"
        )
    for place in empty:
        (top / place).rmdir()
    return [f"warning: no image of {place} can be read" for place in empty]


def attempt(path: Path, target: Path, *, side: int) -> str:
    """Copy one image; return why it cannot be read, or nothing."""
    try:
        shrink(path, target, side)
    except UserError as error:
        return str(error).partition(": mend or remove")[0]
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
    if args.folder.resolve().is_relative_to(args.source.resolve()) and not args.folder.exists():
        sys.exit(f"{args.folder} lies in {args.source}, where it would count as a class: give a folder elsewhere")
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
    for line in said:
        print(one_line(line))
    for part in ("train", "valid"):
        count, kinds = (sum(1 for _ in (args.folder / part).glob(depth)) for depth in ("*/*", "*"))
        print(f"{part}: {count} images of {kinds} classes")


if __name__ == "__main__":
    main()
