"""Images to try a finished network on: a data folder's own, those of a plain folder, or random ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from classification.data.folders import Folder as DataFolder
from classification.data.folders import check_heif, read_folder, without_unreadable
from classification.data.image_files import LeftOut, find_images
from classification.data.loading import FixedBatches, Photos, clear_errors, loader, subset
from classification.data.preprocessing import Preprocessing
from classification.data.tar_shards import find_shards, shard_images
from classification.errors import UserError
from classification.paths import exists, is_folder

RANDOM = 64  # images, where none are given


@dataclass(frozen=True)
class Trial:
    """Images for one network.

    Args:
        data: `train` to calibrate on, `valid` to compare on; -1 stands for an unknown class.
        preprocessing: what the network sees of them.
        said: which images they are.
        notes: what else to say, one line each.
    """

    data: DataFolder
    preprocessing: Preprocessing
    said: str
    notes: list[str] = field(default_factory=list)

    def batches(self, size: int, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (bytes (B, H, W, 3), classes) of the images to compare on."""
        if self.data.valid:
            yield from self._read(self.data.valid, list(range(len(self.data.valid))), size, workers)
            return
        side, random = self.preprocessing.img_size, torch.Generator().manual_seed(0)
        for start in range(0, RANDOM, size):
            shape = (min(size, RANDOM - start), side, side, 3)
            yield torch.randint(256, shape, generator=random, dtype=torch.uint8), torch.full(shape[:1], -1)

    def calibration(self, most: int, size: int, workers: int = 0) -> Iterator[Tensor]:
        """Yield bytes of at most `most` images to calibrate on."""
        chosen = subset(len(self.data.train), most, seed=0, epoch=0)
        for images, _ in self._read(self.data.train, chosen, size, workers):
            yield images

    def _read(
        self, samples: Sequence[tuple[str, int]], chosen: list[int], size: int, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        photos = Photos(samples, self.preprocessing.transform())
        loading = loader(photos, FixedBatches(chosen, size), workers, torch.device("cpu"), persistent=False)
        for images, target, _ in clear_errors(loading, workers):
            yield images, target


def random_trial(preprocessing: Preprocessing) -> Trial:
    """Return random images."""
    return Trial(DataFolder([], [], []), preprocessing, f"{RANDOM} random images, as no --data is given")


def read_trial(
    root: str | Path,
    preprocessing: Preprocessing,
    classes: list[str] | None,
    num_classes: int,
    *,
    calibrate: bool,
    skip_bad: bool = False,
    workers: int = 0,
) -> Trial:
    """Find the images of a data folder, or of a folder without train/ and valid/, whose classes are unknown.

    Args:
        root: the folder.
        preprocessing: of the network.
        classes: its classes in order of index, or None where it does not say.
        num_classes: their number.
        calibrate: whether images of train are needed.
        skip_bad: leave out images that cannot be read.
        workers: threads that look for those.

    Raises:
        UserError: no such folder, no images, or other classes.
    """
    root = Path(root)
    if not is_folder(root):
        what = "is not a folder" if exists(root) else "does not exist"
        raise UserError(
            f"data folder {root} {what}: give one with train/CLASS and valid/CLASS, as mgd prepare makes it"
        )
    notes: list[str] = []
    if any(is_folder(root / name) for name in ("train", "valid", "val")):
        data = read_folder(root, evaluate=True)
        _compare(data.classes, classes, num_classes, root)
        if classes is None:
            notes.append("the checkpoint names no classes, so their order could not be checked")
        if calibrate and not data.train:
            data = DataFolder(data.classes, _images(root / "train"), data.valid, data.notes)
        where = f"{root}, valid"
    else:
        images = _images(root)
        data, where = DataFolder([], images, images), str(root)
        notes.append(f"{root} has no valid/, so the classes of its images are unknown and top-1 is not measured")
    if not calibrate:
        data = DataFolder(data.classes, [], data.valid, data.notes)
    if skip_bad:
        data, _ = without_unreadable(data, workers)
    check_heif(data)
    return Trial(data, preprocessing, f"{len(data.valid)} images of {where}", [*data.notes, *notes])


def _images(folder: Path) -> list[tuple[str, int]]:
    found = [(str(Path(top, name)), -1) for top, names in find_images(folder, LeftOut()) for name in names]
    found += [(path, -1) for paths in shard_images(find_shards(folder)).values() for path in paths]
    if not found:
        raise UserError(f"{folder} has no images: expected train/CLASS/*.jpg and valid/CLASS/*.jpg, or images")
    return found


def _compare(theirs: list[str], ours: list[str] | None, num_classes: int, root: Path) -> None:
    """Refuse images of other classes than the network's."""
    if len(theirs) != num_classes:
        raise UserError(
            f"{root} has {len(theirs)} classes, but the checkpoint has {num_classes}: give images of the same classes"
        )
    for position, (their, our) in enumerate(zip(theirs, ours or theirs, strict=True)):
        if their != our:
            raise UserError(
                f"class {position} is {our!r} in the checkpoint, but {their!r} in {root}: give images of the same "
                "classes"
            )
