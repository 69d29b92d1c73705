"""Split the photographs of a folder into train, valid and test, or find the split that the folder has."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import features

from classification.data.image_files import SUFFIXES, LeftOut, class_names, count_of, find_images, identical_groups
from classification.data.images import has_heif, is_heif, time_taken
from classification.errors import UserError

TRAIN, VALID, TEST = "train", "valid", "test"
SPLITS = {"train", "training", "valid", "val", "validation", "test", "testing"}
VERBS = {TRAIN: "train", VALID: "validate", TEST: "test"}
Images = dict[str, list[Path]]  # by class name


@dataclass(frozen=True)
class Shares:
    """How a folder is split.

    Args:
        valid: part of each class for valid.
        test: part of each class for test; 0 for none.
        group: "none", "folder" or "time": how to find the images of a class that must stay in the same split.
        minutes: for "time": a longer pause begins a new group.
        seed: of the draw.
    """

    valid: float = 0.1
    test: float = 0.0
    group: str = "none"
    minutes: float = 10.0
    seed: int = 0

    def held_out(self) -> dict[str, float]:
        """Return the part of each class for valid, and for test if there is one."""
        return {VALID: self.valid, **({TEST: self.test} if self.test else {})}


@dataclass(frozen=True)
class Split:
    """The split and class of every image.

    Args:
        placed: (split, class name) of every image.
        drawn: whether the split was drawn at random; if not, the folder had it already.
        notes: notes for the user, one line each.
    """

    placed: dict[Path, tuple[str, str]]
    drawn: bool
    notes: list[str] = field(default_factory=list)


def find_split(source: Path, shares: Shares) -> Split:
    """Split a folder with CLASS folders, or read the split of one with train, valid (or val), and perhaps test.

    Raises:
        UserError: the folder has fewer than two classes, only a part of a split, a class without images, or a class
            with too few images to split.
    """
    left_out = LeftOut()
    folders = set(class_names(source, LeftOut()))
    valid_name = next((name for name in ("valid", "val") if name in folders), "")
    is_split = bool(valid_name) and TRAIN in folders
    if is_split:
        parts, notes = _read_split(source, valid_name, folders, left_out)
        names = sorted(set().union(*parts.values()))
    elif folders and {name.lower() for name in folders} <= SPLITS:
        raise UserError(
            f"{source} has {' and '.join(sorted(folders))}, but not both train and valid (or val) with CLASS folders; "
            "to split a folder, give the one that contains the CLASS folders"
        )
    else:
        images, parts, notes = images_by_class(source, left_out), {}, []
        names = sorted(images)
        _check_counts(images, shares)
    if len(names) < 2:
        loose = (
            f"{count_of(len(left_out.loose), 'image')} outside CLASS folders, and no CLASS folder with images"
            if left_out.loose
            else ""
        )
        what = f"images of {names[0]} alone" if names else loose or f"no images ({', '.join(SUFFIXES)})"
        raise UserError(f"{source} has {what}: give the folder that contains the CLASS folders, two or more")
    if not is_split:
        parts, notes = draw_split(images, shares)
    placed = {path: (part, name) for part in parts for name, paths in parts[part].items() for path in paths}
    _check_formats(placed)
    return Split(placed, not is_split, [*left_out.notes(), *notes])


def _read_split(
    source: Path, valid_name: str, folders: set[str], left_out: LeftOut
) -> tuple[dict[str, Images], list[str]]:
    """Return the images by split and class; test is used only if all of its folders are classes of train."""
    parts = {TRAIN: images_by_class(source / TRAIN, left_out), VALID: images_by_class(source / valid_name, left_out)}
    if unknown := sorted(set(parts[VALID]) - set(parts[TRAIN])):
        raise UserError(
            f"{source / valid_name} has classes that {source / TRAIN} lacks ({', '.join(unknown[:5])}): remove them, "
            "or add images of them to train"
        )
    names = set(class_names(source / TEST, LeftOut())) if TEST in folders else set()
    has_test = bool(names) and names <= set(parts[TRAIN])
    if has_test:
        parts[TEST] = images_by_class(source / TEST, left_out)
    notes = [
        f"left out {source / name}: of folders beside train nothing is copied but {valid_name} and a test of its "
        "classes"
        for name in sorted(folders - {TRAIN, valid_name, *([TEST] if has_test else [])})
    ]
    return parts, notes


def _check_counts(images: Images, shares: Shares) -> None:
    needed = ["train", *(VERBS[part] for part in shares.held_out())]
    for name, paths in images.items():
        if len(paths) < len(needed):
            count = "one image" if len(paths) == 1 else f"{len(paths)} images"
            raise UserError(f"class {name} has {count}, but needs one to {' and one to '.join(needed)}: {paths[0]}")


def _check_formats(placed: Iterable[Path]) -> None:
    """Check that the libraries for HEIC and AVIF images are installed, if there are such images."""
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


def images_by_class(top: Path, left_out: LeftOut) -> Images:
    """List the images in each class folder of `top`, at any depth, sorted; add other files to `left_out`.

    Raises:
        UserError: a class folder has no images.
    """
    images: Images = {}
    for name in class_names(top, left_out):
        others = LeftOut()
        images[name] = sorted(Path(folder, file) for folder, files in find_images(top / name, others) for file in files)
        if not images[name]:
            instead = f" but {contents}" if (contents := others.contents()) else ""
            raise UserError(f"{top / name} has no images{instead}: remove it, or add images ({', '.join(SUFFIXES)})")
        left_out.add(others)
    return images


def draw_split(images: Images, shares: Shares) -> tuple[dict[str, Images], list[str]]:
    """Split each class at random, with at least one image per split; return the images by split, and notes.

    All files with equal bytes go to one split, even if they are in several classes. So do all images of a group.

    Raises:
        UserError: a class has too few images or groups.
    """
    owners = {str(path): name for name, paths in images.items() for path in paths}
    copies = identical_groups(owners)
    original = {Path(path): Path(group[0]) for group in copies for path in group}
    unit_of: dict[Path, Path] = {path: original.get(path, path) for paths in images.values() for path in paths}
    num_undated = 0
    for paths in images.values():
        groups, undated = group_images(paths, shares)
        num_undated += undated
        for group in groups:
            join_units(unit_of, group)
    split_of: dict[Path, str] = {}  # by unit
    for name, paths in images.items():
        _draw_class(name, list(dict.fromkeys(original.get(path, path) for path in paths)), unit_of, shares, split_of)
    parts = {
        part: {name: [path for path in paths if split_of[unit_of[path]] == part] for name, paths in images.items()}
        for part in (TRAIN, *shares.held_out())
    }
    notes = describe_copies(copies, owners)
    if num_undated:
        notes.append(f"{count_of(num_undated, 'image')} without a date: each is a group of its own")
    return parts, notes


def group_images(paths: Sequence[Path], shares: Shares) -> tuple[list[list[Path]], int]:
    """Return the groups of a class's images, and with the grouping "time" the number of images without a date."""
    if shares.group == "none":
        return [], 0
    groups: dict[object, list[Path]] = {}
    if shares.group == "folder":
        top = Path(os.path.commonpath([path.parent for path in paths]))
        for path in paths:
            if path.parent != top:
                groups.setdefault(path.parent, []).append(path)
        return list(groups.values()), 0
    dated = sorted((time, path) for path in paths if (time := time_taken(str(path))) is not None)
    number = 0
    for previous, (time, path) in zip([None, *(time for time, _ in dated)], dated, strict=False):
        number += previous is not None and (time - previous).total_seconds() > 60 * shares.minutes
        groups.setdefault(number, []).append(path)
    return list(groups.values()), len(paths) - len(dated)


def join_units(unit_of: dict[Path, Path], group: Sequence[Path]) -> None:
    """Merge the units of all images of a group into one."""
    first, others = unit_of[group[0]], {unit_of[path] for path in group[1:]} - {unit_of[group[0]]}
    if others:
        unit_of |= {path: first for path, unit in unit_of.items() if unit in others}


def _draw_class(
    name: str, images: list[Path], unit_of: dict[Path, Path], shares: Shares, split_of: dict[Path, str]
) -> None:
    """Choose a split for the units of a class that have none yet.

    Args:
        name: of the class.
        images: of the class, each once.
        unit_of: the unit of every image; all images of a unit go to the same split.
        shares: how to split.
        split_of: the split of each unit; the units of this class are added.

    Raises:
        UserError: the class has too few units.
    """
    sizes: dict[Path, int] = {}
    for path in images:
        sizes[unit_of[path]] = sizes.get(unit_of[path], 0) + 1
    splits = (TRAIN, *shares.held_out())
    if len(sizes) < len(splits):
        needed = " and one to ".join(VERBS[part] for part in splits)
        count = "copies of one image" if len(images) == 1 else f"{count_of(len(sizes), 'group')} of images"
        raise UserError(f"class {name} has {count}, but needs one to {needed}: {images[0]}")
    free = [unit for unit in sizes if unit not in split_of]
    free = random.Random(b"%d " % shares.seed + os.fsencode(name)).sample(free, len(free))
    for part, share in shares.held_out().items():
        wanted = min(max(1, round(share * len(images))), len(images) - 1)
        wanted -= sum(size for unit, size in sizes.items() if split_of.get(unit) == part)
        used = {split_of.get(unit) for unit in sizes}
        empty = len({*splits} - used - {part})  # other splits without a unit: each needs one of those that are free
        split_of |= dict.fromkeys(_choose_units(free, sizes, wanted)[: max(0, len(free) - empty)], part)
        free = [unit for unit in free if unit not in split_of]
    split_of |= dict.fromkeys(free, TRAIN)
    for part in splits:
        if all(split_of[unit] != part for unit in sizes):
            raise UserError(
                f"class {name} shares too many of its images with other classes: none is left for {part}; remove the "
                f"copies from one of the classes, for example {images[0]}"
            )


def _choose_units(free: Sequence[Path], sizes: Mapping[Path, int], most: int) -> list[Path]:
    """Return units, in order, that together have at most `most` images; the smallest one if all have more."""
    chosen: list[Path] = []
    remaining = most
    for unit in free:
        if sizes[unit] <= remaining:
            chosen.append(unit)
            remaining -= sizes[unit]
    if not chosen and most > 0 and free:
        chosen = [min(free, key=lambda unit: sizes[unit])]
    return chosen


def describe_copies(groups: list[list[str]], owners: dict[str, str]) -> list[str]:
    """Return notes on files with the same image."""
    notes = []
    if groups:
        count = f"{sum(map(len, groups))} files with only {count_of(len(groups), 'image')}"
        pair = " = ".join(groups[0][:2])
        notes.append(
            f"{count}, byte for byte, for example {pair}: all files of an image are put on one side of the split"
        )
    if shared := [group for group in groups if len({owners[path] for path in group}) > 1]:
        other = next(path for path in shared[0] if owners[path] != owners[shared[0][0]])
        notes.append(
            f"warning: {count_of(len(shared), 'image')} in more than one class, for example {shared[0][0]} = {other}"
        )
    return notes
