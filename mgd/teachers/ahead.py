"""Compute teachers one batch ahead, on some threads, while the student trains on the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from mgd.taps import Outputs

T = TypeVar("T")


class Ahead:
    """Compute the teachers' outputs for the next batch on separate threads, while the caller works on the current one.

    One after the other, a step takes the sum of the teachers' and the student's time, each on all threads. With this
    class, it takes the longer of both, each on its own threads. That is faster on a CPU if small maps do not use all
    threads, or if the teacher is limited by computation and the student by memory. The outputs for one more batch are
    in memory.

    Args:
        teachers: results of `mgd.freeze`; their forward must not use random numbers.
        threads: number of torch's threads for the teachers; the caller uses the others while it iterates.

    Raises:
        ValueError: `threads` leaves no thread for the caller.
    """

    def __init__(self, teachers: Sequence[nn.Module], threads: int) -> None:
        self._all = torch.get_num_threads()
        if not 0 < threads < self._all:
            raise ValueError(f"the teachers can have 1 to {self._all - 1} of {self._all} threads; got {threads}")
        self._teachers, self._threads = list(teachers), threads

    def __call__(
        self, batches: Iterable[T], images: Callable[[T], Tensor]
    ) -> Iterator[tuple[T, Future[list[Outputs]]]]:
        """Yield each batch with the future outputs of its teachers; those of the next batch are already started.

        Args:
            batches: of any kind.
            images: returns the teachers' images (B, 3, H, W) of a batch; called on their thread.
        """

        def outputs(batch: T) -> list[Outputs]:
            batch_images = images(batch)
            return [teacher(batch_images) for teacher in self._teachers]

        # torch's number of threads is set for each thread separately.
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
