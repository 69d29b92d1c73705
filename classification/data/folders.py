"""Photographs in class folders: data sets, batches and loaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from classification.data.cache import Cache
from classification.data.image_files import SUFFIXES, LeftOut, across, class_names, count_of, find_images
from classification.data.images import has_heif, is_heif, read_image, to_bytes, unreadable
from classification.data.lists import numbered_classes, read_list
from classification.data.transforms import Transform
from classification.data.unequal import balanced, shuffled
from classification.errors import RunError, UserError
from classification.paths import exists, is_folder
from classification.runs.interrupt import outlast

MOST_COMPARED = 100_000  # images whose contents are compared at the start of a run


class Photos(Dataset[tuple[Tensor, int, int]]):
    """Images of one split, as bytes: (height, width, 3) uint8, class index, index.

    An item is asked for by (epoch, index): random transforms draw from a generator seeded by (seed, epoch, index), so
    neither the number of workers nor a resumption changes them.

    Args:
        samples: (path, class index) of every image.
        transform: (3, height, width) -> bytes of the size that the network sees.
        seed: of the random transforms.
        cache: the decoded images, or None to read their files.
    """

    def __init__(
        self, samples: list[tuple[str, int]], transform: Transform, seed: int = 0, cache: Cache | None = None
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed
        self.cache = cache

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, index = key
        path, target = self.samples[index]
        pixels = to_bytes(read_image(path)) if self.cache is None else self.cache[index]
        outside = torch.random.get_rng_state()
        torch.random.default_generator.manual_seed(_mix(self.seed, epoch, index))
        try:
            return self.transform(pixels.permute(2, 0, 1)).permute(1, 2, 0).contiguous(), target, index
        finally:
            torch.random.set_rng_state(outside)


def _mix(*numbers: int) -> int:
    """Turn numbers into one 63-bit seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class Folder:
    """The two splits of a folder, and the class names in order of index.

    Args:
        classes: their names.
        train: (path, class index) of every image to train on.
        valid: the same of every image to evaluate on.
        notes: what was left out, or looks wrong, one line each.
    """

    classes: list[str]
    train: list[tuple[str, int]]
    valid: list[tuple[str, int]]
    notes: list[str] = field(default_factory=list, compare=False)


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
        raise UserError(f"data folder {root} {'is not a folder' if exists(root) else 'does not exist'}")
    left = LeftOut()
    valid = _split(root, "valid", "val") if valid_list is None else None
    spare = train_list is not None or (evaluate and not _names_classes(root / "train", valid))
    train = None if spare else _split(root, "train")
    naming = train if labels and train is not None else valid
    classes = None if naming is None else _class_names(naming)
    known = num_classes if classes is None else len(classes)
    listed = [] if train_list is None else read_list(train_list, root, known, labels=labels)
    valid_samples = [] if valid_list is None else read_list(valid_list, root, known)
    if classes is None:
        classes = numbered_classes([*(listed if labels else []), *valid_samples], num_classes)
    if valid is not None:
        valid_samples = _valid_images(valid, classes, train, left)
    if train is not None:
        listed = _train_images(train, classes, left) if labels else _unlabelled(train, left)
    return Folder(classes, listed, valid_samples, left.notes())


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
        raise UserError(f"no image of {', '.join(names[:5])} can be read; the first is {first} ({bad[first]})")
    first = ", ".join(list(bad)[:3]) + (" ..." if len(bad) > 3 else "")
    notes = [f"left out {len(bad)} images that cannot be read: {first}"] if bad else []
    return Folder(data.classes, train, valid, [*data.notes, *notes]), bad


def check_heif(data: Folder) -> None:
    """Refuse HEIC images where the library that reads them is missing.

    Raises:
        UserError: naming the first, and what to install.
    """
    if not has_heif() and (found := [path for path, _ in (*data.train, *data.valid) if is_heif(path)]):
        raise UserError(
            f"{count_of(len(found), 'image')} in HEIC, as {found[0]}: `pip install pillow-heif` to read them, or leave "
            "them out by --bad-images skip"
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
                samples += [(str(Path(folder, name)), label) for name in names]
        left.add(beside[-1])
    return samples, beside


def _without_images(classes: list[str], samples: list[tuple[str, int]], beside: list[LeftOut]) -> dict[str, LeftOut]:
    """Return the classes without images, and what each has instead."""
    filled = {target for _, target in samples}
    return {name: beside[label] for label, name in enumerate(classes) if label not in filled}


def _told(empty: dict[str, LeftOut]) -> str:
    contents = {name: left.contents() for name, left in list(empty.items())[:5]}
    told = ", ".join(f"{name} ({text})" if text else name for name, text in contents.items())
    return f"{told}; images end in {' '.join(SUFFIXES)}" if any(left.others for left in empty.values()) else told


def _train_images(train: Path, classes: list[str], left: LeftOut) -> list[tuple[str, int]]:
    _class_names(train, left)
    samples, beside = _class_images(train, classes, left)
    if empty := _without_images(classes, samples, beside):
        raise UserError(f"{train} has class folders without images: {_told(empty)}")
    return samples


def _valid_images(valid: Path, classes: list[str], train: Path | None, left: LeftOut) -> list[tuple[str, int]]:
    if unknown := sorted(set(_class_names(valid, left)) - set(classes)):
        raise UserError(f"{valid} has classes that {train} lacks: {', '.join(unknown[:5])}")
    samples, beside = _class_images(valid, classes, left)
    if not samples:
        raise UserError(f"{valid} holds no images{f' ({left.kinds()})' if left.others else ''}")
    # A class that valid lacks, or whose folder is empty, may be meant; one of films alone is not.
    if empty := {name: has for name, has in _without_images(classes, samples, beside).items() if has.others}:
        raise UserError(f"{valid} has class folders without images: {_told(empty)}")
    return samples


def _unlabelled(folder: Path, left: LeftOut) -> list[tuple[str, int]]:
    beside = LeftOut()
    paths = sorted(Path(below, name) for below, names in find_images(folder, beside) for name in names)
    left.add(beside)
    if not paths:
        raise UserError(f"{folder} holds no images{f' ({found})' if (found := beside.contents()) else ''}")
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
            f"{root} has no folder {wanted}: if its folders are the classes, make a data folder of it by "
            f"mgd prepare {root} NEW_FOLDER, and name that"
        )
    raise UserError(f"{root} has no folder {wanted}: expected one folder per class in it")


def _class_names(split: Path, left: LeftOut | None = None) -> list[str]:
    if not (names := class_names(split, LeftOut() if left is None else left)):
        raise UserError(f"{split} has no class folders: expected {split}/CLASS/*.jpg, or terms that need no labels")
    return names


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """Shuffled batches of (epoch, index), the same global batches on any number of ranks.

    n images make ceil(n / batch_size) batches whose sizes differ by one at most, so no batch is short and no image is
    left out; each rank takes its slice of every batch. Batches follow each other in the epoch's order of all images, so
    that those seen are its beginning, whatever the batch size and the number of ranks were: what is left makes batches
    in the same way, which are the same ones where nothing has changed.

    Args:
        num: n.
        batch_size: images of a global batch at most.
        seed: of the permutation, together with the epoch.
        rank: of this process.
        size: number of ranks.
        parts: into which each rank divides its slice.
        labels: the class of every image, for epochs in which the classes are equally frequent.

    Raises:
        UserError: a batch with fewer images than parts on all ranks.
    """

    def __init__(
        self, num: int, batch_size: int, seed: int, rank: int = 0, size: int = 1, parts: int = 1,
        labels: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.num, self.most, self.seed, self.rank, self.size, self.parts = num, batch_size, seed, rank, size, parts
        self.labels = None if labels is None else np.array(labels)
        self.epoch = 0
        self.start = self.seen = 0  # steps of the epoch that are done already, and their images
        if num // len(self) < size * parts:
            of = f"{size} ranks" if parts == 1 else f"{size * parts} parts"
            raise UserError(f"{num} images in batches of {batch_size} leave some of {of} without any: raise -b")

    def __len__(self) -> int:
        """Steps of the epoch, those done included."""
        return self.start + self._left()

    def _left(self) -> int:
        return -(-(self.num - self.seen) // self.most)

    def begin(self, epoch: int, start: int = 0, seen: int = 0) -> None:
        """Turn to an epoch of which `start` steps are done, that saw `seen` images over all ranks.

        Raises:
            UserError: what is left has fewer images than ranks and parts.
        """
        self.epoch, self.start, self.seen = epoch, start, seen
        needed, left = self.size * self.parts, self.num - seen
        if left and left // self._left() < needed:
            raise UserError(
                f"{left} images are left of the epoch, too few for batches of {self.most} in {needed} parts (ranks "
                "times --accumulate): go on with the former -b, ranks and --accumulate until the epoch ends"
            )

    def batch_size(self, step: int) -> int:
        """Images of global batch `step`, over all ranks."""
        images, steps = self.num - self.seen, self._left()
        return images // steps + (step - self.start < images % steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self.labels is None:
            order = shuffled(self.num, self.seed, self.epoch)[self.seen :]
        else:
            order = balanced(self.labels, self.seed, self.epoch)[self.seen :]
        for batch in np.array_split(order, self._left()) if len(order) else []:
            yield [(int(epoch), int(index)) for epoch, index in np.array_split(batch, self.size)[self.rank]]


class FixedBatches(Sampler[list[tuple[int, int]]]):
    """Batches over given indices in their order, dealt out over the ranks, each image once.

    Args:
        indices: which images.
        batch_size: images of a batch on one rank.
        rank: of this process.
        size: number of ranks.
    """

    def __init__(self, indices: list[int], batch_size: int, rank: int = 0, size: int = 1) -> None:
        self.indices, self.batch_size = indices[rank::size], batch_size
        self.common = -(-(len(indices) // size) // batch_size)  # batches that every rank has

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


def subset(num: int, most: int, seed: int, epoch: int) -> list[int]:
    """Return at most `most` of `num` indices, ascending, drawn by (seed, epoch)."""
    if num <= most:
        return list(range(num))
    return sorted(np.random.default_rng([seed, epoch, 1]).choice(num, most, replace=False).tolist())


def loader(
    photos: Photos,
    batches: Sampler[list[tuple[int, int]]],
    workers: int,
    device: torch.device,
    *,
    persistent: bool = True,
    ending: Any = None,
) -> DataLoader[tuple[Tensor, int, int]]:
    """Load `batches` of `photos`, as bytes for `normalise`.

    Args:
        photos: the images.
        batches: indices of each batch.
        workers: loading processes; 0 to load in this one.
        device: that the batches go to.
        persistent: keep the processes alive between epochs.
        ending: as in `outlast`.
    """
    return DataLoader(
        photos,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=partial(outlast, ending=ending),
        generator=torch.Generator(),  # of the processes' seeds: the default one would be drawn from at every start
    )


def told(loading: Iterable[Any], workers: int) -> Iterator[Any]:
    """Iterate a loader; say what to do where one of its processes dies.

    Raises:
        RunError: one did.
    """
    try:
        yield from loading
    except RuntimeError as error:
        text = str(error)
        if "shared memory" in text:
            raise RunError(
                "the loading processes ran out of shared memory (/dev/shm): give the container more of it "
                f"(--shm-size), lower --workers (now {workers}), or read without them, by --workers 0"
            ) from error
        if "DataLoader worker" not in text:
            raise
        raise RunError(
            f"a loading process died ({text.splitlines()[0]}): where memory is short, lower --workers (now {workers})"
        ) from error
