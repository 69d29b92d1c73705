"""Images to test a finished network on: of a data folder, of a folder without classes, or random ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from classification.data.folders import DataFolder, check_data_folder, check_heif, read_folder, without_unreadable
from classification.data.image_files import LeftOut, find_images
from classification.data.loading import FixedBatches, Photos, draw_subset, explain_worker_errors, make_loader
from classification.data.preprocessing import Preprocessing
from classification.data.tar_shards import find_shards, shard_images
from classification.errors import UserError
from classification.paths import is_folder

NUM_RANDOM = 64  # number of random images, without --data


@dataclass(frozen=True)
class Trial:
    """Images for one network.

    Args:
        data: `train` to calibrate with, `valid` to compare on; an unknown class is -1.
        preprocessing: of the network.
        description: which images they are, in words.
        notes: notes for the user, one line each.
    """

    data: DataFolder
    preprocessing: Preprocessing
    description: str
    notes: list[str] = field(default_factory=list)

    def batches(self, size: int, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (bytes (B, H, W, 3), classes) of the images to compare on."""
        if self.data.valid:
            yield from self._read(self.data.valid, list(range(len(self.data.valid))), size, workers)
            return
        side, random = self.preprocessing.img_size, torch.Generator().manual_seed(0)
        for start in range(0, NUM_RANDOM, size):
            shape = (min(size, NUM_RANDOM - start), side, side, 3)
            yield torch.randint(256, shape, generator=random, dtype=torch.uint8), torch.full(shape[:1], -1)

    def calibration(self, max_images: int, size: int, workers: int = 0) -> Iterator[Tensor]:
        """Yield bytes (B, H, W, 3) of at most `max_images` images to calibrate with."""
        chosen = draw_subset(len(self.data.train), max_images, seed=0, epoch=0)
        for images, _ in self._read(self.data.train, chosen, size, workers):
            yield images

    def _read(
        self, samples: Sequence[tuple[str, int]], chosen: list[int], size: int, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        photos = Photos(samples, self.preprocessing.transform())
        loading = make_loader(photos, FixedBatches(chosen, size), workers, torch.device("cpu"), persistent=False)
        for images, target, _ in explain_worker_errors(loading, workers):
            yield images, target


def random_trial(preprocessing: Preprocessing) -> Trial:
    """Return a trial with random images."""
    return Trial(DataFolder([], [], []), preprocessing, f"{NUM_RANDOM} random images, as no --data is given")


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
        classes: the network's class names in order of index, or None if they are not known.
        num_classes: their number.
        calibrate: whether images of train are needed.
        skip_bad: whether to leave out images that cannot be read.
        workers: number of threads that read all images to find those.

    Raises:
        UserError: there is no such folder, it has no images, or its classes are not those of the network.
    """
    root = Path(root)
    check_data_folder(root)
    notes: list[str] = []
    if any(is_folder(root / name) for name in ("train", "valid", "val")):
        data = read_folder(root, evaluate=True)
        _check_classes(data.classes, classes, num_classes, root)
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
    samples = [(str(Path(top, name)), -1) for top, names in find_images(folder, LeftOut()) for name in names]
    samples += [(path, -1) for paths in shard_images(find_shards(folder)).values() for path in paths]
    if not samples:
        raise UserError(f"{folder} has no images: expected train/CLASS/*.jpg and valid/CLASS/*.jpg, or images")
    return samples


def _check_classes(folder_classes: list[str], network_classes: list[str] | None, num_classes: int, root: Path) -> None:
    """Check that the classes of the folder are those of the network."""
    if len(folder_classes) != num_classes:
        raise UserError(
            f"{root} has {len(folder_classes)} classes, but the checkpoint has {num_classes}: give images of the same "
            "classes"
        )
    for position, (own, other) in enumerate(zip(network_classes or folder_classes, folder_classes, strict=True)):
        if own != other:
            raise UserError(
                f"class {position} is {own!r} in the checkpoint, but {other!r} in {root}: give images of the same "
                "classes"
            )
