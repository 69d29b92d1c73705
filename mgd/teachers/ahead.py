"""Teachers one batch ahead: their forward on some threads while the student trains on the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from mgd.taps import Outputs

T = TypeVar("T")


class Ahead:
    """Compute what teachers say of the next batch, on threads of their own, while the caller works on this one.

    A step in turn takes T + S, teachers and student each on all threads; this way the longer of T' and S', each on its
    part of them. It pays on a processor where small maps keep many threads waiting, or where the teacher is busy
    multiplying and the student moving memory; it holds the teachers' outputs for one batch more.

    Args:
        teachers: what `mgd.freeze` returns; their forward draws no random numbers.
        threads: how many of torch's threads are theirs; the caller keeps the others while it iterates.

    Raises:
        ValueError: `threads` leaves the caller none.
    """

    def __init__(self, teachers: Sequence[nn.Module], threads: int) -> None:
        self._all = torch.get_num_threads()
        if not 0 < threads < self._all:
            raise ValueError(f"the teachers can have 1 to {self._all - 1} of {self._all} threads; got {threads}")
        self._teachers, self._threads = list(teachers), threads

    def __call__(
        self, batches: Iterable[T], images: Callable[[T], Tensor]
    ) -> Iterator[tuple[T, Future[list[Outputs]]]]:
        """Yield each of `batches` with its teachers' outputs to come, those of the next being begun.

        Args:
            batches: whatever a loader gives.
            images: makes the teachers' images (B, 3, H, W) of one, on their thread.
        """

        def outputs(batch: T) -> list[Outputs]:
            batch_images = images(batch)
            return [teacher(batch_images) for teacher in self._teachers]

        # torch's number of threads is each thread's own.
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(self._threads,)) as pool:
            torch.set_num_threads(self._all - self._threads)
            try:
                begun: list[tuple[T, Future[list[Outputs]]]] = []
                for batch in batches:
                    begun.append((batch, pool.submit(outputs, batch)))
                    if len(begun) == 2:
                        yield begun.pop(0)
                yield from begun
            finally:
                torch.set_num_threads(self._all)
