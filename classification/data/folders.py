"""Data folders: lists of (path, class index) from class folders, text files or tar shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from classification.data.image_files import SUFFIXES, LeftOut, class_names, count_of, find_images, identical_pairs
from classification.data.images import find_unreadable, has_heif, is_heif
from classification.data.lists import numbered_classes, read_list
from classification.data.soft_labels import ClassProbabilities
from classification.data.tar_shards import find_shards, read_shards
from classification.errors import UserError
from classification.paths import exists, is_folder

MOST_COMPARED = 100_000  # images whose contents are compared at the start of a run


@dataclass(frozen=True)
class DataFolder:
    """The images of a data folder.

    Args:
        classes: class names in order of index.
        train: (path, class index) of every image to train on.
        valid: (path, class index) of every image to evaluate on.
        notes: what was left out, or looks wrong, one line each.
        soft: class probabilities by path, for images of train with soft labels.
        read: the folders and lists that were read; the images can change only if one of these changes.
    """

    classes: list[str]
    train: Sequence[tuple[str, int]]
    valid: Sequence[tuple[str, int]]
    notes: list[str] = field(default_factory=list, compare=False)
    soft: dict[str, ClassProbabilities] = field(default_factory=dict)
    read: list[str] = field(default_factory=list, compare=False)


def read_folder(
    root: str | Path,
    *,
    labels: bool = True,
    train_list: str | None = None,
    valid_list: str | None = None,
    num_classes: int | None = None,
    evaluate: bool = False,
) -> DataFolder:
    """List `root`/train/CLASS/* and `root`/valid/CLASS/* (or val/). Class indices follow the sorted names in train.

    Without labels, train holds images at any depth, their class index is -1, and valid names the classes. A list
    replaces its split (see `read_list`), and so do tar shards in a split without class folders (see `read_shards`).
    Then the other split names the classes. If both splits are replaced, the names are the class indices.

    Args:
        root: the data folder.
        labels: whether train has classes.
        train_list: a list to read instead of train/.
        valid_list: a list to read instead of valid/.
        num_classes: number of classes if lists or shards replace both splits; None to take it from their labels.
        evaluate: whether train is needed only for the names of the classes; it is not read if it does not have them.

    Raises:
        UserError: a missing folder, a class without images in train, a class of valid that train lacks, a wrong list.
    """
    root = Path(root)
    check_data_folder(root)
    left_out = LeftOut()
    valid = _find_split(root, "valid", "val") if valid_list is None else None
    skip_train = train_list is not None or (evaluate and not _train_names_classes(root / "train", valid))
    train = None if skip_train else _find_split(root, "train")
    (train, train_shards), (valid, valid_shards) = _shards_of(train), _shards_of(valid)
    naming_split = train if labels and train is not None else valid
    classes = None if naming_split is None else _class_names(naming_split)
    expected_classes = num_classes if classes is None else len(classes)
    train_samples = _read_listed(train_list, train_shards, root, expected_classes, labels=labels)
    valid_samples = _read_listed(valid_list, valid_shards, root, expected_classes)
    if classes is None:
        classes = numbered_classes([*(train_samples if labels else []), *valid_samples], num_classes)
    if valid is not None:
        valid_samples = _valid_images(valid, classes, train, left_out)
    if train is not None:
        train_samples = _train_images(train, classes, left_out) if labels else _unlabelled_images(train, left_out)
    lists = [path for path in (train_list, valid_list) if path is not None]
    shards = [*train_shards, *valid_shards]
    parents = {os.path.dirname(path) for path, _ in (*train_samples, *valid_samples)} if lists else set()  # noqa: PTH120
    places = [*lists, *map(str, shards), *sorted(parents | {str(shard.parent) for shard in shards})]
    return DataFolder(
        classes, train_samples, valid_samples, left_out.notes(), read=[str(root), *left_out.folders, *places]
    )


def check_data_folder(root: Path) -> None:
    """Check that a data folder exists.

    Raises:
        UserError: it does not, or is a file.
    """
    if not is_folder(root):
        what = "is not a folder" if exists(root) else "does not exist"
        raise UserError(
            f"data folder {root} {what}: give one with train/CLASS and valid/CLASS, as mgd prepare makes it"
        )


def has_numbered_classes(root: str | Path, train_list: str | None, valid_list: str | None) -> bool:
    """Return whether lists or shards replace both splits, so that no folders name the classes."""
    splits = ((train_list, ("train",)), (valid_list, ("valid", "val")))
    return all(file or any(find_shards(Path(root, name)) for name in names) for file, names in splits)


def _shards_of(split: Path | None) -> tuple[Path | None, list[Path]]:
    """Return (folder, []), or (None, its shards) if it holds shards instead of class folders."""
    shards = [] if split is None else find_shards(split)
    return (None if shards else split), shards


def _read_listed(
    file: str | None, shards: list[Path], root: Path, num_classes: int | None, *, labels: bool = True
) -> list[tuple[str, int]]:
    """Return the images of the shards, or else of the list, or else none."""
    if shards:
        return read_shards(shards, num_classes, labels=labels)
    return [] if file is None else read_list(file, root, num_classes, labels=labels)


def without_unreadable(data: DataFolder, workers: int) -> tuple[DataFolder, dict[str, str]]:
    """Read every image once; return the folder without unreadable images, and {path: cause} of these.

    Raises:
        UserError: a class, or valid, has no images left.
    """
    bad = find_unreadable([path for path, _ in (*data.train, *data.valid)], workers)
    train, valid = ([sample for sample in part if sample[0] not in bad] for part in (data.train, data.valid))
    emptied = {target for _, target in data.train} - {target for _, target in train}
    if emptied or not valid:
        names = [data.classes[target] if target >= 0 else "train/" for target in sorted(emptied)] or ["valid/"]
        first = next((path for path, target in data.train if target in emptied), data.valid[0][0])
        raise UserError(
            f"no image of {', '.join(names[:5])} can be read, for example {first} ({bad[first]}): repair them, or add "
            "others"
        )
    first = ", ".join(list(bad)[:3]) + (" ..." if len(bad) > 3 else "")
    notes = [f"left out {len(bad)} images that cannot be read: {first}"] if bad else []
    return replace(data, train=train, valid=valid, notes=[*data.notes, *notes]), bad


def check_heif(data: DataFolder) -> None:
    """Check that HEIC images can be read, if there are any.

    Raises:
        UserError: the library is missing; the message names the first image, and what to install.
    """
    if not has_heif() and (heif := [path for path, _ in (*data.train, *data.valid) if is_heif(path)]):
        raise UserError(
            f"{count_of(len(heif), 'image')} in HEIC format, for example {heif[0]}: `pip install pillow-heif` to "
            "read them, or leave them out with --bad-images skip"
        )


def find_shared_images(data: DataFolder, max_compared: int = MOST_COMPARED) -> list[str]:
    """Return a warning if an image of valid is in train too, byte for byte.

    With more than `max_compared` images, only their paths are compared: reading the size of each file takes too long.
    """
    train, valid = ([path for path, _ in part] for part in (data.train, data.valid))
    if len(train) + len(valid) > max_compared:
        listed = set(valid).intersection(train)
        pairs = [(path, path) for path in sorted(listed)]
    else:
        pairs = identical_pairs(train, valid)
    if not pairs:
        return []
    first = "" if pairs[0][0] == pairs[0][1] else f" = {pairs[0][0]}"
    shared = f"{count_of(len(pairs), 'image')} both in train and in valid, byte for byte"
    return [f"warning: {shared} ({pairs[0][1]}{first}): the accuracy on valid will be too high"]


def _class_images(split: Path, classes: list[str], left_out: LeftOut) -> tuple[list[tuple[str, int]], list[LeftOut]]:
    """List the images of every class, in the order of torchvision's ImageFolder, and per class the other files."""
    samples, others = [], []
    for label, class_name in enumerate(classes):
        others.append(LeftOut())
        if is_folder(split / class_name):
            for folder, names in find_images(split / class_name, others[-1]):
                samples += [(os.path.join(folder, name), label) for name in names]  # noqa: PTH118
        left_out.add(others[-1])
    return samples, others


def _empty_classes(classes: list[str], samples: list[tuple[str, int]], others: list[LeftOut]) -> dict[str, LeftOut]:
    """Return the classes without images, and the other files of each."""
    filled = {target for _, target in samples}
    return {name: others[label] for label, name in enumerate(classes) if label not in filled}


def _empty_error(split: Path, empty: dict[str, LeftOut]) -> UserError:
    contents = {name: left.contents() for name, left in list(empty.items())[:5]}
    listed = ", ".join(f"{name} ({text})" if text else name for name, text in contents.items())
    suffixes = f"; images end in {' '.join(SUFFIXES)}" if any(left.others for left in empty.values()) else ""
    return UserError(
        f"{split} has class folders without images: {listed}{suffixes}: add images, or remove these folders"
    )


def _train_images(train: Path, classes: list[str], left_out: LeftOut) -> list[tuple[str, int]]:
    _class_names(train, left_out)
    samples, others = _class_images(train, classes, left_out)
    if empty := _empty_classes(classes, samples, others):
        raise _empty_error(train, empty)
    return samples


def _valid_images(valid: Path, classes: list[str], train: Path | None, left_out: LeftOut) -> list[tuple[str, int]]:
    if unknown := sorted(set(_class_names(valid, left_out)) - set(classes)):
        raise UserError(
            f"{valid} has classes that {train} lacks ({', '.join(unknown[:5])}): remove them, or add images of them to "
            "train"
        )
    samples, others = _class_images(valid, classes, left_out)
    if not samples:
        raise UserError(f"{valid} has no images{f' ({left_out.kinds()})' if left_out.others else ''}")
    # A class may be missing or empty in valid on purpose. A class folder that holds only other files is a mistake.
    empty = _empty_classes(classes, samples, others)
    if wrong := {name: left for name, left in empty.items() if left.others}:
        raise _empty_error(valid, wrong)
    return samples


def _unlabelled_images(folder: Path, left_out: LeftOut) -> list[tuple[str, int]]:
    others = LeftOut()
    paths = sorted(Path(folder_below, name) for folder_below, names in find_images(folder, others) for name in names)
    left_out.add(others)
    if not paths:
        raise UserError(f"{folder} has no images{f' ({contents})' if (contents := others.contents()) else ''}")
    return [(str(path), -1) for path in paths]


def _train_names_classes(train: Path, valid: Path | None) -> bool:
    """Return whether train has folders, and those of valid are among them."""
    names = class_names(train, LeftOut()) if is_folder(train) else []
    return bool(names) and (valid is None or set(class_names(valid, LeftOut())) <= set(names))


def _find_split(root: Path, *names: str) -> Path:
    for name in names:
        if is_folder(root / name):
            return root / name
    expected = " or ".join(f"{name}/" for name in names)
    if len(class_names(root, LeftOut())) > 1:
        raise UserError(
            f"{root} has no folder {expected}: if its folders are the classes, run mgd prepare {root} NEW_FOLDER, and "
            "give NEW_FOLDER instead"
        )
    raise UserError(f"{root} has no folder {expected}: expected one folder per class in it")


def _class_names(split: Path, left_out: LeftOut | None = None) -> list[str]:
    if not (names := class_names(split, LeftOut() if left_out is None else left_out)):
        raise UserError(f"{split} has no class folders: expected {split}/CLASS/*.jpg, or terms that need no labels")
    return names
