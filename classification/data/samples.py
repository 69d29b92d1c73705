"""A list of (path, class index) stored in arrays, which processes share instead of copying."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from classification.paths import relative

Sample = tuple[str, int]  # path of an image, class index


class Samples(Sequence[Sample]):
    """A sequence of (path, class index), stored in three arrays.

    A forked process that reads a list of tuples changes the reference counts of its objects, so after an epoch every
    process has its own copy of the list. An array has only one reference count.

    Args:
        samples: (path, class index) of every image.
    """

    def __init__(self, samples: Iterable[Sample]) -> None:
        sequence = samples if isinstance(samples, Sequence) else list(samples)
        paths = [os.fsencode(path) for path, _ in sequence]
        self.bytes = np.frombuffer(b"".join(paths), dtype=np.uint8)
        self.ends = np.cumsum([0, *map(len, paths)], dtype=np.int64)
        self.targets = np.array([target for _, target in sequence], dtype=np.int64)
        self.digest = ""  # the result of `samples_digest`, if it is cached

    @classmethod
    def from_arrays(cls, arrays: Sequence[NDArray[Any]]) -> Samples:
        """Return the samples that have these `arrays`."""
        samples = cls([])
        samples.bytes, samples.ends, samples.targets = arrays
        return samples

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """The bytes of all paths, where each path ends (from 0), and the class indices."""
        return self.bytes, self.ends, self.targets

    def __len__(self) -> int:
        return len(self.targets)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        path = self.bytes[self.ends[index] : self.ends[index + 1]].tobytes()
        return os.fsdecode(path), int(self.targets[index])

    def __iter__(self) -> Iterator[Sample]:
        text, ends = self.bytes.tobytes(), self.ends.tolist()
        for number, target in enumerate(self.targets.tolist()):
            yield os.fsdecode(text[ends[number] : ends[number + 1]]), target


def samples_digest(samples: Sequence[Sample], root: str | Path) -> str:
    """Hash the paths relative to `root`, and the class indices; cached lists carry their hash with them."""
    if isinstance(samples, Samples) and samples.digest:
        return samples.digest
    digest = hashlib.sha256()
    for path, target in samples:
        digest.update(os.fsencode(f"{relative(path, root)} {target}\n"))
    return digest.hexdigest()
