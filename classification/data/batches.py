"""Which images are read in which batches: training batches, evaluation batches, subsets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from classification.errors import UserError

Key = tuple[int, ...]  # epoch and index of an image, and after them which repetition of it this is, unless the first


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
        repeats: R; with more than 1 an epoch has ceil(n / R) other images, each R times in turn and n in all, so that
            a batch sees an image under several augmentations (Hoffer et al., 2020, arXiv:1901.09335).

    Raises:
        UserError: a batch with fewer images than parts on all ranks.
    """

    def __init__(
        self, num: int, batch_size: int, seed: int, rank: int = 0, size: int = 1, parts: int = 1, repeats: int = 1
    ) -> None:
        self.num, self.most, self.seed, self.rank, self.size, self.parts = num, batch_size, seed, rank, size, parts
        self.repeats = repeats
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

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num)
        repeated = np.repeat(order[: -(-self.num // self.repeats)], self.repeats)[: self.num]
        places = np.arange(self.seen, self.num)
        for batch in np.array_split(places, self._left()) if len(places) else []:
            own = np.array_split(batch, self.size)[self.rank]
            yield [self._key(int(repeated[place]), place % self.repeats) for place in own.tolist()]

    def _key(self, index: int, repetition: int) -> Key:
        return (self.epoch, index, repetition) if repetition else (self.epoch, index)


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
