"""Images in batches: a data set, which of its images make a batch, and the processes that load them."""

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
from classification.data.draws import drawing_from
from classification.data.images import read_image, to_bytes
from classification.data.samples import Samples
from classification.data.stored import StoredViews
from classification.data.transforms import Transform
from classification.data.unequal import balanced, shuffled
from classification.errors import RunError, UserError
from classification.system.interrupt import outlast

Key = tuple[int, ...]  # epoch and index of an image, and after them which repetition of it this is, unless the first


class Photos(Dataset[Any]):
    """Images of one split, as bytes: (height, width, 3) uint8, class index, index; (V, height, width, 3) for V views.

    An item is asked for by (epoch, index), or (epoch, index, repetition): random transforms draw from a generator
    seeded by these and the seed, so neither the number of workers nor a resumption changes them.

    Args:
        samples: (path, class index) of every image.
        transform: (3, height, width) -> bytes of the size that the network sees, those of V views as (V, 3, H, W).
        seed: of the random transforms.
        cache: the decoded images, or None to read their files.
        stored: what a teacher said of views, which then take the place of `transform`: see `StoredViews`.
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
        with drawing_from(self.seed, *key):
            return self.transform(self._decoded(index)).movedim(-3, -1).contiguous(), target, index

    def _decoded(self, index: int) -> Tensor:
        """Return (3, height, width) bytes of an image."""
        pixels = to_bytes(read_image(self.samples[index][0])) if self.cache is None else self.cache[index]
        return pixels.permute(2, 0, 1)


class TrainBatches(Sampler[list[Key]]):
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
        repeats: R; with more than 1 an epoch has the first ceil(n / R) of these images, each R times in turn and n in
            all, so that a batch sees an image under several augmentations (Hoffer et al., 2020, arXiv:1901.09335).

    Raises:
        UserError: a batch with fewer images than parts on all ranks.
    """

    def __init__(
        self, num: int, batch_size: int, seed: int, rank: int = 0, size: int = 1, parts: int = 1,
        labels: Sequence[int] | None = None, repeats: int = 1,
    ) -> None:  # fmt: skip
        self.num, self.most, self.seed, self.rank, self.size, self.parts = num, batch_size, seed, rank, size, parts
        self.labels = None if labels is None else np.array(labels)
        self.repeats = repeats
        self.epoch = 0
        self.start = self.seen = 0  # steps of the epoch that are done already, and their images
        if num // len(self) < size * parts:
            of = f"{size} ranks" if parts == 1 else f"{size * parts} parts"
            raise UserError(f"{num} images in batches of {batch_size} leave some of {of} without images: raise -b")

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
                "times --accumulate): keep -b, the number of ranks and --accumulate as they were until the epoch ends"
            )

    def batch_size(self, step: int) -> int:
        """Images of global batch `step`, over all ranks."""
        images, steps = self.num - self.seen, self._left()
        return images // steps + (step - self.start < images % steps)

    def __iter__(self) -> Iterator[list[Key]]:
        if self.labels is None:
            order = shuffled(self.num, self.seed, self.epoch)
        else:
            order = balanced(self.labels, self.seed, self.epoch)
        places = np.arange(self.seen, self.num)
        for batch in np.array_split(places, self._left()) if len(places) else []:
            own = np.array_split(batch, self.size)[self.rank]
            pairs, repetitions = order[own // self.repeats].tolist(), (own % self.repeats).tolist()
            yield [(*pair, *([again] if again else [])) for pair, again in zip(pairs, repetitions, strict=True)]


class FixedBatches(Sampler[list[Key]]):
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

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


def subset(num: int, most: int, seed: int, epoch: int) -> list[int]:
    """Return at most `most` of `num` indices, ascending, drawn by (seed, epoch)."""
    if num <= most:
        return list(range(num))
    return sorted(np.random.default_rng([seed, epoch, 1]).choice(num, most, replace=False).tolist())


def loader(
    photos: Photos,
    batches: Sampler[list[Key]],
    workers: int,
    device: torch.device,
    *,
    persistent: bool = True,
    ending: Any = None,
) -> DataLoader[tuple[Tensor, int, int]]:
    """Load `batches` of `photos`, as bytes for `normalise`.

    On Linux the processes are forked, also by a rank that was spawned itself: they share its lists and decoded images,
    and notice when it is killed. Processes of another kind would have copies, and those of a fork server outlive it.

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
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=torch.Generator(),  # of the processes' seeds: the default one would be drawn from at every start
    )


def clear_errors(loading: Iterable[Any], workers: int) -> Iterator[Any]:
    """Iterate a loader; if one of its processes dies, say what to do.

    Raises:
        RunError: one did.
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
