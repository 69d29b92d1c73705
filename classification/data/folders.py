"""Photographs in class folders: data sets, batches and loaders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from classification.data.image_files import SUFFIXES, LeftOut, across, class_names, count_of, find_images
from classification.data.images import has_heif, is_heif, unreadable
from classification.data.lists import numbered_classes, read_list
from classification.data.soft_labels import Likely
from classification.data.tar_shards import find_shards, read_shards
from classification.errors import UserError
from classification.paths import exists, is_folder

MOST_COMPARED = 100_000  # images whose contents are compared at the start of a run


@dataclass(frozen=True)
class Folder:
    """The two splits of a folder, and the class names in order of index.

    Args:
        classes: their names.
        train: (path, class index) of every image to train on.
        valid: the same of every image to evaluate on.
        notes: what was left out, or looks wrong, one line each.
        soft: probabilities of classes, by path, of images of train that have soft labels.
        read: the folders and lists that were read; while they stay as they are, so do the images.
    """

    classes: list[str]
    train: Sequence[tuple[str, int]]
    valid: Sequence[tuple[str, int]]
    notes: list[str] = field(default_factory=list, compare=False)
    soft: dict[str, Likely] = field(default_factory=dict)
    read: list[str] = field(default_factory=list, compare=False)


def read_folder(
    root: str | Path,
    *,
    labels: bool = True,
    train_list: str | None = None,
    valid_list: str | None = None,
    num_classes: int | None = None,
    evaluate: bool = False,
) -> Folder:
    """List `root`/train/CLASS/* and `root`/valid/CLASS/* (or val/); class indices are those of train, sorted by name.

    Without labels, train holds images at any depth, their class index is -1, and valid names the classes. A list takes
    the place of its split (see `read_list`): then the other split names the classes, or if none is left, their indices.
    So do tar shards in a split without class folders (see `read_shards`).

    Args:
        root: the data folder.
        labels: whether train has classes.
        train_list: a list to read instead of train/.
        valid_list: a list to read instead of valid/.
        num_classes: how many classes lists number, or None for as many as their labels say.
        evaluate: whether train only names the classes: where it does not, as without labels or lists, it is left out.

    Raises:
        UserError: a missing folder, a class without images in train, a class of valid that train lacks, a wrong list.
    """
    root = Path(root)
    if not is_folder(root):
        what = "is not a folder" if exists(root) else "does not exist"
        raise UserError(
            f"data folder {root} {what}: give one with train/CLASS and valid/CLASS, as mgd prepare makes it"
        )
    left = LeftOut()
    valid = _split(root, "valid", "val") if valid_list is None else None
    spare = train_list is not None or (evaluate and not _names_classes(root / "train", valid))
    train = None if spare else _split(root, "train")
    (train, train_shards), (valid, valid_shards) = _packed(train), _packed(valid)
    naming = train if labels and train is not None else valid
    classes = None if naming is None else _class_names(naming)
    known = num_classes if classes is None else len(classes)
    listed = _listed(train_list, train_shards, root, known, labels=labels)
    valid_samples = _listed(valid_list, valid_shards, root, known)
    if classes is None:
        classes = numbered_classes([*(listed if labels else []), *valid_samples], num_classes)
    if valid is not None:
        valid_samples = _valid_images(valid, classes, train, left)
    if train is not None:
        listed = _train_images(train, classes, left) if labels else _unlabelled(train, left)
    lists = [path for path in (train_list, valid_list) if path is not None]
    shards = [*train_shards, *valid_shards]
    parents = {os.path.dirname(path) for path, _ in (*listed, *valid_samples)} if lists else set()  # noqa: PTH120
    places = [*lists, *map(str, shards), *sorted(parents | {str(shard.parent) for shard in shards})]
    return Folder(classes, listed, valid_samples, left.notes(), read=[str(root), *left.read, *places])


def numbers_classes(root: str | Path, train_list: str | None, valid_list: str | None) -> bool:
    """Return whether lists or shards take the place of both splits, so that no folders name the classes."""
    splits = ((train_list, ("train",)), (valid_list, ("valid", "val")))
    return all(file or any(find_shards(Path(root, name)) for name in names) for file, names in splits)


def _packed(split: Path | None) -> tuple[Path | None, list[Path]]:
    """Return the folder, or None and its shards where it holds them instead of class folders."""
    shards = [] if split is None else find_shards(split)
    return (None if shards else split), shards


def _listed(
    file: str | None, shards: list[Path], root: Path, num_classes: int | None, *, labels: bool = True
) -> list[tuple[str, int]]:
    """Return the images of a split that is a list, or shards, or neither."""
    if shards:
        return read_shards(shards, num_classes, labels=labels)
    return [] if file is None else read_list(file, root, num_classes, labels=labels)


def without_unreadable(data: Folder, workers: int) -> tuple[Folder, dict[str, str]]:
    """Read every image once; return the folder without those that cannot be read, and why by path.

    Raises:
        UserError: a class, or valid, is left without images.
    """
    bad = unreadable([path for path, _ in (*data.train, *data.valid)], workers)
    train, valid = ([sample for sample in part if sample[0] not in bad] for part in (data.train, data.valid))
    lost = {target for _, target in data.train} - {target for _, target in train}
    if lost or not valid:
        names = [data.classes[target] if target >= 0 else "train/" for target in sorted(lost)] or ["valid/"]
        first = next((path for path, target in data.train if target in lost), data.valid[0][0])
        raise UserError(f"no image of {', '.join(names[:5])} can be read, for example {first} ({bad[first]})")
    first = ", ".join(list(bad)[:3]) + (" ..." if len(bad) > 3 else "")
    notes = [f"left out {len(bad)} images that cannot be read: {first}"] if bad else []
    return replace(data, train=train, valid=valid, notes=[*data.notes, *notes]), bad


def check_heif(data: Folder) -> None:
    """Refuse HEIC images where the library that reads them is missing.

    Raises:
        UserError: naming the first, and what to install.
    """
    if not has_heif() and (found := [path for path, _ in (*data.train, *data.valid) if is_heif(path)]):
        raise UserError(
            f"{count_of(len(found), 'image')} in HEIC format, for example {found[0]}: `pip install pillow-heif` to "
            "read them, or leave them out with --bad-images skip"
        )


def shared_images(data: Folder, most: int = MOST_COMPARED) -> list[str]:
    """Return a warning if an image of valid is in train too, byte for byte.

    More than `most` images are compared by path alone: asking for the size of each would take too long.
    """
    train, valid = ([path for path, _ in part] for part in (data.train, data.valid))
    if len(train) + len(valid) > most:
        listed = set(valid).intersection(train)
        pairs = [(path, path) for path in sorted(listed)]
    else:
        pairs = across(train, valid)
    if not pairs:
        return []
    first = "" if pairs[0][0] == pairs[0][1] else f" = {pairs[0][0]}"
    shared = f"{count_of(len(pairs), 'image')} both in train and in valid, byte for byte"
    return [f"warning: {shared} ({pairs[0][1]}{first}): the accuracy on valid will be too high"]


def _class_images(split: Path, classes: list[str], left: LeftOut) -> tuple[list[tuple[str, int]], list[LeftOut]]:
    """List the images of every class, at any depth, in the order of torchvision's ImageFolder, and what else it has."""
    samples, beside = [], []
    for label, class_name in enumerate(classes):
        beside.append(LeftOut())
        if is_folder(split / class_name):
            for folder, names in find_images(split / class_name, beside[-1]):
                samples += [(os.path.join(folder, name), label) for name in names]  # noqa: PTH118
        left.add(beside[-1])
    return samples, beside


def _without_images(classes: list[str], samples: list[tuple[str, int]], beside: list[LeftOut]) -> dict[str, LeftOut]:
    """Return the classes without images, and what each has instead."""
    filled = {target for _, target in samples}
    return {name: beside[label] for label, name in enumerate(classes) if label not in filled}


def _describe(empty: dict[str, LeftOut]) -> str:
    contents = {name: left.contents() for name, left in list(empty.items())[:5]}
    listed = ", ".join(f"{name} ({text})" if text else name for name, text in contents.items())
    return f"{listed}; images end in {' '.join(SUFFIXES)}" if any(left.others for left in empty.values()) else listed


def _train_images(train: Path, classes: list[str], left: LeftOut) -> list[tuple[str, int]]:
    _class_names(train, left)
    samples, beside = _class_images(train, classes, left)
    if empty := _without_images(classes, samples, beside):
        raise UserError(f"{train} has class folders without images: {_describe(empty)}")
    return samples


def _valid_images(valid: Path, classes: list[str], train: Path | None, left: LeftOut) -> list[tuple[str, int]]:
    if unknown := sorted(set(_class_names(valid, left)) - set(classes)):
        raise UserError(f"{valid} has classes that {train} lacks: {', '.join(unknown[:5])}")
    samples, beside = _class_images(valid, classes, left)
    if not samples:
        raise UserError(f"{valid} has no images{f' ({left.kinds()})' if left.others else ''}")
    # A class that valid lacks, or whose folder is empty, may be meant; one of films alone is not.
    if empty := {name: has for name, has in _without_images(classes, samples, beside).items() if has.others}:
        raise UserError(f"{valid} has class folders without images: {_describe(empty)}")
    return samples


def _unlabelled(folder: Path, left: LeftOut) -> list[tuple[str, int]]:
    beside = LeftOut()
    paths = sorted(Path(below, name) for below, names in find_images(folder, beside) for name in names)
    left.add(beside)
    if not paths:
        raise UserError(f"{folder} has no images{f' ({found})' if (found := beside.contents()) else ''}")
    return [(str(path), -1) for path in paths]


def _names_classes(train: Path, valid: Path | None) -> bool:
    """Return whether the folders of train are classes, those of valid among them."""
    names = class_names(train, LeftOut()) if is_folder(train) else []
    return bool(names) and (valid is None or set(class_names(valid, LeftOut())) <= set(names))


def _split(root: Path, *names: str) -> Path:
    for name in names:
        if is_folder(root / name):
            return root / name
    wanted = " or ".join(f"{name}/" for name in names)
    if len(class_names(root, LeftOut())) > 1:
        raise UserError(
            f"{root} has no folder {wanted}: if its folders are the classes, run mgd prepare {root} NEW_FOLDER, and "
            "give NEW_FOLDER instead"
        )
    raise UserError(f"{root} has no folder {wanted}: expected one folder per class in it")


def _class_names(split: Path, left: LeftOut | None = None) -> list[str]:
    if not (names := class_names(split, LeftOut() if left is None else left)):
        raise UserError(f"{split} has no class folders: expected {split}/CLASS/*.jpg, or terms that need no labels")
    return names
