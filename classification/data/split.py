"""Which photographs of a folder train, validate and test: found as they lie there, or drawn."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import features

from classification.data.image_files import SUFFIXES, LeftOut, class_names, count_of, find_images, identical
from classification.data.images import has_heif, is_heif, taken_at
from classification.errors import UserError

TRAIN, VALID, TEST = "train", "valid", "test"
SPLITS = {"train", "training", "valid", "val", "validation", "test", "testing"}
DOES = {TRAIN: "train", VALID: "validate", TEST: "test"}
Images = dict[str, list[Path]]  # of each class


@dataclass(frozen=True)
class Shares:
    """How a folder without a split is divided.

    Args:
        valid: part of each class that validates.
        test: part of each class that tests; 0 for none.
        group: "none", "folder" or "time": which images of a class stay on one side.
        minutes: of "time": a pause that long begins a new group.
        seed: of the draw.
    """

    valid: float = 0.1
    test: float = 0.0
    group: str = "none"
    minutes: float = 10.0
    seed: int = 0

    def held(self) -> dict[str, float]:
        """Return the part of each side beside train that there is."""
        return {VALID: self.valid, **({TEST: self.test} if self.test else {})}


@dataclass(frozen=True)
class Split:
    """Where every image goes.

    Args:
        placed: side and class of every image.
        drawn: whether the split was drawn here; else it was there.
        notes: what is to be said, one line each.
    """

    placed: dict[Path, tuple[str, str]]
    drawn: bool
    notes: list[str] = field(default_factory=list)


def find_split(source: Path, shares: Shares) -> Split:
    """Place every image of a folder that holds CLASS folders, or train, valid (or val) and test with CLASS folders.

    Raises:
        UserError: there are no two class folders with images, half a split, a class without images, or a class with
            too few images to divide.
    """
    left = LeftOut()
    folders = set(class_names(source, LeftOut()))
    held = next((name for name in ("valid", "val") if name in folders), "")
    there = bool(held) and TRAIN in folders
    if there:
        parts, notes = _found(source, held, folders, left)
        names = sorted(set().union(*parts.values()))
    elif folders and {name.lower() for name in folders} <= SPLITS:
        raise UserError(
            f"{source} has {' and '.join(sorted(folders))}, but not both train and valid (or val) with CLASS folders; "
            "to split a folder, give the one that contains the CLASS folders"
        )
    else:
        images, parts, notes = classes(source, left), {}, []
        names = sorted(images)
        _check_counts(images, shares)
    if len(names) < 2:
        loose = (
            f"{count_of(len(left.loose), 'image')} outside CLASS folders, and no CLASS folder with images"
            if left.loose
            else ""
        )
        what = f"images of {names[0]} alone" if names else loose or f"no images ({', '.join(SUFFIXES)})"
        raise UserError(f"{source} has {what}: give the folder that contains the CLASS folders, two or more")
    if not there:
        parts, notes = divide(images, shares)
    placed = {path: (part, name) for part in parts for name, paths in parts[part].items() for path in paths}
    _check_kinds(placed)
    return Split(placed, not there, [*left.notes(), *notes])


def _found(source: Path, held: str, folders: set[str], left: LeftOut) -> tuple[dict[str, Images], list[str]]:
    """Return a split that is there; test counts where its folders are classes of train."""
    parts = {TRAIN: classes(source / TRAIN, left), VALID: classes(source / held, left)}
    if unknown := sorted(set(parts[VALID]) - set(parts[TRAIN])):
        raise UserError(f"{source / held} has classes that {source / TRAIN} lacks: {', '.join(unknown[:5])}")
    names = set(class_names(source / TEST, LeftOut())) if TEST in folders else set()
    tests = bool(names) and names <= set(parts[TRAIN])
    if tests:
        parts[TEST] = classes(source / TEST, left)
    notes = [
        f"left out {source / name}: of folders beside train nothing is copied but {held} and a test of its classes"
        for name in sorted(folders - {TRAIN, held, *([TEST] if tests else [])})
    ]
    return parts, notes


def _check_counts(images: Images, shares: Shares) -> None:
    needed = ["train", *(DOES[side] for side in shares.held())]
    for name, paths in images.items():
        if len(paths) < len(needed):
            has = "one image" if len(paths) == 1 else f"{len(paths)} images"
            raise UserError(f"class {name} has {has}, but needs one to {' and one to '.join(needed)}: {paths[0]}")


def _check_kinds(placed: Iterable[Path]) -> None:
    """Refuse images of a kind that this installation cannot read."""
    paths = list(placed)
    if not has_heif() and (heif := [path for path in paths if is_heif(path.name)]):
        raise UserError(
            f"{count_of(len(heif), 'image')} in HEIC format, for example {heif[0]}: `pip install pillow-heif` to read "
            "them"
        )
    avif = [path for path in paths if path.name.lower().endswith(".avif")]
    if avif and not (features.modules.get("avif") and features.check("avif")):
        what = f"{count_of(len(avif), 'image')} in AVIF format, for example {avif[0]}"
        raise UserError(f"{what}: `pip install 'pillow>=11.3'` to read them")


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
            raise UserError(f"{top / name} has no images{but}: remove it, or add images ({', '.join(SUFFIXES)})")
        left.add(beside)
    return found


def divide(images: Images, shares: Shares) -> tuple[dict[str, Images], list[str]]:
    """Draw the sides of each class, one image at least for each; return them, and what is to be said.

    Files of the same bytes are one image, also of several classes; what `shares.group` joins stays together.

    Raises:
        UserError: a class has too few images, or too few groups of them.
    """
    owners = {str(path): name for name, paths in images.items() for path in paths}
    copies = identical(owners)
    original = {Path(path): Path(group[0]) for group in copies for path in group}
    unit: dict[Path, Path] = {path: original.get(path, path) for paths in images.values() for path in paths}
    undated = 0
    for paths in images.values():
        groups, without = grouped(paths, shares)
        undated += without
        for group in groups:
            join(unit, group)
    side: dict[Path, str] = {}  # of each unit that is drawn
    for name, paths in images.items():
        _draw(name, list(dict.fromkeys(original.get(path, path) for path in paths)), unit, shares, side)
    parts = {
        part: {name: [path for path in paths if side[unit[path]] == part] for name, paths in images.items()}
        for part in (TRAIN, *shares.held())
    }
    said = copied(copies, owners)
    if undated:
        said.append(f"{count_of(undated, 'image')} without a date: each is a group of its own")
    return parts, said


def grouped(paths: Sequence[Path], shares: Shares) -> tuple[list[list[Path]], int]:
    """Return the groups of a class's images, and how many of the images do not say their time, where that counts."""
    if shares.group == "none":
        return [], 0
    groups: dict[object, list[Path]] = {}
    if shares.group == "folder":
        top = Path(os.path.commonpath([path.parent for path in paths]))
        for path in paths:
            if path.parent != top:
                groups.setdefault(path.parent, []).append(path)
        return list(groups.values()), 0
    dated = sorted((time, path) for path in paths if (time := taken_at(str(path))) is not None)
    number = 0
    for before, (time, path) in zip([None, *(time for time, _ in dated)], dated, strict=False):
        number += before is not None and (time - before).total_seconds() > 60 * shares.minutes
        groups.setdefault(number, []).append(path)
    return list(groups.values()), len(paths) - len(dated)


def join(unit: dict[Path, Path], group: Sequence[Path]) -> None:
    """Give all images of a group, and all that are joined to them, one unit."""
    first, others = unit[group[0]], {unit[path] for path in group[1:]} - {unit[group[0]]}
    if others:
        unit |= {path: first for path, own in unit.items() if own in others}


def _draw(name: str, ones: list[Path], unit: dict[Path, Path], shares: Shares, side: dict[Path, str]) -> None:
    """Set the side of the units of a class that other classes have not set; `ones` are its images, copies left out."""
    sizes: dict[Path, int] = {}
    for path in ones:
        sizes[unit[path]] = sizes.get(unit[path], 0) + 1
    sides = (TRAIN, *shares.held())
    if len(sizes) < len(sides):
        needed = " and one to ".join(DOES[part] for part in sides)
        what = "copies of one image" if len(ones) == 1 else f"{count_of(len(sizes), 'group')} of images"
        raise UserError(f"class {name} has {what}, but needs one to {needed}: {ones[0]}")
    free = [one for one in sizes if one not in side]
    free = random.Random(b"%d " % shares.seed + os.fsencode(name)).sample(free, len(free))
    for part, share in shares.held().items():
        wanted = min(max(1, round(share * len(ones))), len(ones) - 1)
        wanted -= sum(size for one, size in sizes.items() if side.get(one) == part)
        used = {side.get(one) for one in sizes}
        empty = len({*sides} - used - {part})  # which need one unit each
        side |= dict.fromkeys(_chosen(free, sizes, wanted)[: max(0, len(free) - empty)], part)
        free = [one for one in free if one not in side]
    side |= dict.fromkeys(free, TRAIN)
    for part in sides:
        if all(side[one] != part for one in sizes):
            raise UserError(
                f"class {name} shares too many of its images with other classes: none is left for {part}; remove the "
                f"copies from one of the classes, for example {ones[0]}"
            )


def _chosen(free: Sequence[Path], sizes: Mapping[Path, int], wanted: int) -> list[Path]:
    """Return the first units that together hold `wanted` images at most; the smallest one where all hold more."""
    chosen: list[Path] = []
    left = wanted
    for one in free:
        if sizes[one] <= left:
            chosen.append(one)
            left -= sizes[one]
    if not chosen and wanted > 0 and free:
        chosen = [min(free, key=lambda one: sizes[one])]
    return chosen


def copied(groups: list[list[str]], owners: dict[str, str]) -> list[str]:
    """Return what is to be said of files that hold the same image."""
    said = []
    if groups:
        count, pair = (
            f"{sum(map(len, groups))} files with only {count_of(len(groups), 'image')}",
            " = ".join(groups[0][:2]),
        )
        said.append(
            f"{count}, byte for byte, for example {pair}: all files of an image are put on one side of the split"
        )
    if two := [group for group in groups if len({owners[path] for path in group}) > 1]:
        other = next(path for path in two[0] if owners[path] != owners[two[0][0]])
        said.append(f"warning: {count_of(len(two), 'image')} in more than one class, for example {two[0][0]} = {other}")
    return said
