"""Read training images for the terms before an epoch, without changing the training's random numbers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

IMAGES, LABELS, INDEX = "pixel_values", "labels", "index"  # columns of a batch


@contextlib.contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch, which transforms may use, and restore them afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def read_batches(
    dataset: Any,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    *,
    batch_size: int,
    workers: int = 0,
    num_images: int | None = None,
    seed: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
) -> Iterator[Mapping[str, Any]]:
    """Yield this rank's share of a data set in an order that depends on the seed alone.

    Args:
        dataset: one with a length; or an iterable one, of which every rank reads the first images in their order.
        collate: makes a batch from a list of items.
        batch_size: images per batch.
        workers: number of loading processes.
        num_images: number of images of this rank; None for all.
        seed: of the order.
        rank: of this process.
        num_ranks: number of ranks.
    """
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = Subset(dataset, order[rank::num_ranks][:num_images])
        yield from DataLoader(chosen, batch_size, num_workers=workers, collate_fn=collate)
        return
    items = iter(dataset) if num_images is None else islice(iter(dataset), num_images)
    while batch := list(islice(items, batch_size)):
        yield collate(batch)


def as_views(
    batch: Mapping[str, Any], labels: Sequence[str] = (LABELS,)
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return images (B, 3, H, W), target and index of a batch of the Trainer; None for a missing target or index.

    Args:
        batch: of the Trainer.
        labels: possible names of the target; the first that the batch has is used.

    Raises:
        ValueError: the batch has no images.
    """
    if not isinstance(images := batch.get(IMAGES), Tensor):
        names = ", ".join(batch) or "nothing"
        raise ValueError(
            f"a batch must hold images as a tensor {IMAGES!r}; it holds {names}: let the transform of the data set "
            f"return them, and pass remove_unused_columns=False"
        )
    return images, next((batch[name] for name in labels if name in batch), None), batch.get(INDEX)
