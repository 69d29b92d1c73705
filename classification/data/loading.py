"""Batches of images: the data set, the samplers, and the loading processes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from classification.data.cache import Cache
from classification.data.draws import seeded_draws
from classification.data.images import read_image, to_bytes
from classification.data.preprocessing import Transform
from classification.data.samples import Samples
from classification.data.stored import StoredViews
from classification.data.unequal import balanced_epoch, shuffled_epoch
from classification.errors import RunError, UserError
from classification.system.interrupt import outlast

Key = tuple[int, ...]  # epoch and index of an image; then the number of the repetition, unless it is the first


class Photos(Dataset[Any]):
    """Images of one split: (H, W, 3) bytes, class index, index. With V views per image, (V, H, W, 3) bytes.

    The key of an item is (epoch, index), or (epoch, index, repetition). Random transforms depend only on the key and
    the seed, so neither the number of workers nor resuming changes them.

    Args:
        samples: (path, class index) of every image.
        transform: (3, height, width) bytes -> (3, H, W) bytes for the network, or (V, 3, H, W) for V views.
        seed: of the random transforms.
        cache: the decoded images, or None to read the files.
        stored: stored views with a teacher's outputs, which replace `transform`; see `StoredViews`.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        transform: Transform,
        seed: int = 0,
        cache: Cache | None = None,
        stored: StoredViews | None = None,
    ) -> None:
        self.samples = samples if isinstance(samples, Samples) else Samples(samples)
        self.transform = transform
        self.seed = seed
        self.cache = cache
        self.stored = stored

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> tuple[Any, ...]:
        index = key[1]
        target = self.samples[index][1]
        if self.stored is not None:
            return self.stored(key, self._decoded, self.samples)
        with seeded_draws(self.seed, *key):
            return self.transform(self._decoded(index)).movedim(-3, -1).contiguous(), target, index

    def _decoded(self, index: int) -> Tensor:
        """Return an image as (3, height, width) bytes."""
        pixels = to_bytes(read_image(self.samples[index][0])) if self.cache is None else self.cache[index]
        return pixels.permute(2, 0, 1)


class TrainBatches(Sampler[list[Key]]):
    """Shuffled batches of keys; the global batches are the same for any number of ranks.

    n images make ceil(n / batch_size) batches whose sizes differ by at most one, so every image is used once. Each rank
    takes a slice of every batch. The batches are consecutive parts of the epoch's shuffled order. So a resumed epoch
    divides what is left of that order, even if the batch size or the number of ranks has changed; if neither has, the
    batches are the same as without the interruption.

    Args:
        num: n.
        batch_size: largest number of images in a global batch.
        seed: of the shuffled order, together with the epoch.
        rank: of this process.
        size: number of ranks.
        parts: number of parts into which each rank divides its slice (--accumulate).
        labels: the class of every image, to make the classes equally frequent; None to use each image once.
        repeats: R. If it is above 1, an epoch has the first ceil(n / R) images of the order, each R times in a row, n
            in all. So a batch has several augmentations of an image (Hoffer et al., 2020, arXiv:1901.09335).

    Raises:
        UserError: a batch would have fewer images than ranks times parts.
    """

    def __init__(
        self, num: int, batch_size: int, seed: int, rank: int = 0, size: int = 1, parts: int = 1,
        labels: Sequence[int] | None = None, repeats: int = 1,
    ) -> None:  # fmt: skip
        self.num, self.max_size, self.seed, self.rank, self.size, self.parts = num, batch_size, seed, rank, size, parts
        self.labels = None if labels is None else np.array(labels)
        self.repeats = repeats
        self.epoch = 0
        self.start = self.seen = 0  # steps of the epoch that are done, and their images
        if num // len(self) < size * parts:
            of = f"{size} ranks" if parts == 1 else f"{size * parts} parts"
            raise UserError(f"{num} images in batches of {batch_size} leave some of {of} without images: raise -b")

    def __len__(self) -> int:
        """Return the number of steps of the epoch, including those that are done."""
        return self.start + self._steps_left()

    def _steps_left(self) -> int:
        return -(-(self.num - self.seen) // self.max_size)

    def begin(self, epoch: int, start: int = 0, seen: int = 0) -> None:
        """Begin or resume an epoch of which `start` steps with `seen` images over all ranks are done.

        Raises:
            UserError: the rest has too few images for batches on all ranks.
        """
        self.epoch, self.start, self.seen = epoch, start, seen
        needed, left = self.size * self.parts, self.num - seen
        if left and left // self._steps_left() < needed:
            raise UserError(
                f"{left} images are left of the epoch, too few for batches of {self.max_size} in {needed} parts (ranks "
                "times --accumulate): keep -b, the number of ranks and --accumulate as they were until the epoch ends"
            )

    def batch_size(self, step: int) -> int:
        """Return the number of images of global batch `step`, over all ranks."""
        images, steps = self.num - self.seen, self._steps_left()
        return images // steps + (step - self.start < images % steps)

    def __iter__(self) -> Iterator[list[Key]]:
        if self.labels is None:
            order = shuffled_epoch(self.num, self.seed, self.epoch)
        else:
            order = balanced_epoch(self.labels, self.seed, self.epoch)
        places = np.arange(self.seen, self.num)
        for batch in np.array_split(places, self._steps_left()) if len(places) else []:
            own = np.array_split(batch, self.size)[self.rank]
            pairs, repetitions = order[own // self.repeats].tolist(), (own % self.repeats).tolist()
            yield [(*pair, *([again] if again else [])) for pair, again in zip(pairs, repetitions, strict=True)]


class FixedBatches(Sampler[list[Key]]):
    """Batches of the images at `indices`, in this order; the ranks take turns, so each image is used once.

    Args:
        indices: of the images.
        batch_size: images per batch on one rank.
        rank: of this process.
        size: number of ranks.
    """

    def __init__(self, indices: list[int], batch_size: int, rank: int = 0, size: int = 1) -> None:
        self.indices, self.batch_size = indices[rank::size], batch_size
        self.common = -(-(len(indices) // size) // batch_size)  # the number of batches that every rank has

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


def draw_subset(num: int, max_images: int, seed: int, epoch: int) -> list[int]:
    """Return at most `most` of `num` indices, ascending, drawn by (seed, epoch)."""
    if num <= max_images:
        return list(range(num))
    return sorted(np.random.default_rng([seed, epoch, 1]).choice(num, max_images, replace=False).tolist())


def make_loader(
    photos: Photos,
    batches: Sampler[list[Key]],
    workers: int,
    device: torch.device,
    *,
    persistent: bool = True,
    ending: Any = None,
) -> DataLoader[tuple[Tensor, int, int]]:
    """Return a loader of `batches` of `photos`, as bytes for `normalise`.

    On Linux the loading processes are forked: they share the lists and decoded images of this process, and end when it
    is killed. Spawned processes would copy the data, and processes of a fork server would outlive this one.

    Args:
        photos: the images.
        batches: keys of each batch.
        workers: number of loading processes; 0 to load in this process.
        device: the batches will be copied to it.
        persistent: whether the loading processes stay alive between epochs.
        ending: as in `outlast`.
    """
    return DataLoader(
        photos,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=partial(outlast, ending=ending),
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=torch.Generator(),  # otherwise the loader would draw its seeds from the global generator
    )


def explain_worker_errors(loading: Iterable[Any], workers: int) -> Iterator[Any]:
    """Iterate over a loader, and explain what to do if one of its processes dies.

    Raises:
        RunError: a loading process died.
    """
    try:
        yield from loading
    except RuntimeError as error:
        text = str(error)
        if "shared memory" in text:
            raise RunError(
                "the loading processes ran out of shared memory (/dev/shm): give the container more (--shm-size), "
                f"lower --workers (now {workers}), or use --workers 0"
            ) from error
        if "DataLoader worker" not in text:
            raise
        raise RunError(
            f"a loading process died ({text.splitlines()[0]}): if memory is short, lower --workers (now {workers})"
        ) from error
