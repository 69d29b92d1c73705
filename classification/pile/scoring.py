"""The scores of a teacher, or of several as one, shard by shard."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from classification.data.image_files import file_digest
from classification.data.inference import PixelBatch, read_batches
from classification.data.preprocessing import Preprocessing
from classification.errors import RunError, UserError
from classification.models.sizes import fit_size
from classification.models.trained import Trained, networks_digest, open_trained
from classification.pile.shards import Plan, Row, claimed, encode, finish, path_hash, shard_order
from mgd import logits_of


@dataclass(frozen=True)
class Teachers:
    """Networks of the same classes that see the same image, and whose probabilities are averaged.

    Args:
        members: the networks, in eval mode.
        device: that they are on.
    """

    members: list[Trained]
    device: torch.device

    @property
    def seen(self) -> Preprocessing:
        """What they see of an image; they differ in mean and std at most."""
        return self.members[0].preprocessing

    def scores(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the teachers say of bytes (B, H, W, 3), on the CPU: (B, K) and (B,), float32.

        The first is log((1/n) sum_i softmax(logits_i)) of n teachers, the second their mean energy,
        -(1/n) sum_i log sum_k exp(logits_ik): it is high for images unlike those of the training.

        Reference: Liu et al., Energy-based Out-of-distribution Detection, 2020, arXiv:2010.03759, equation 4 with T 1.

        A network that was made for images of another size sees them resized.

        Raises:
            RunError: outputs that are not finite, or too large a batch.
        """
        found, energies = [], []
        try:
            for member in self.members:
                images = member.preprocessing.normalise(pixels.to(self.device))
                side = member.preprocessing.img_size
                if images.shape[2] != side:
                    images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
                weight = next(member.network.parameters())
                logits = logits_of(member.network(images.to(weight.dtype).contiguous())).float()
                energies.append(-logits.logsumexp(1))
                found.append(logits.log_softmax(1))
        except torch.OutOfMemoryError as error:
            raise RunError(f"a batch of {len(pixels)} images needs too much memory: lower -b") from error
        mean = found[0] if len(found) == 1 else torch.stack(found).logsumexp(0) - math.log(len(found))
        energy = torch.stack(energies).mean(0)
        if not (mean.isfinite().all() and energy.isfinite().all()):
            raise RunError("the teacher's outputs are not finite: are its weights damaged?")
        return mean.cpu(), energy.cpu()

    def at(self, size: int) -> Teachers:
        """Return them for images of another size; the networks themselves are changed where they must be.

        Raises:
            UserError: one of them cannot see such images.
        """
        return Teachers([_at_size(member, size) for member in self.members], self.device)

    def digest(self) -> str:
        """Return 32 hexadecimal digits of all weights, and of what each network sees of an image."""
        return networks_digest(self.members)


def open_teachers(
    paths: Sequence[Path],
    arch: str | None,
    device: torch.device,
    img_size: int | None = None,
    *,
    one_cut: bool = True,
) -> Teachers:
    """Load the teachers, the first of which says classes and preprocessing.

    Args:
        paths: the checkpoints.
        arch: their network, where they do not say it.
        device: that they go to.
        img_size: side of the square that they see, in pixels; None for their own.
        one_cut: whether all must see the same part of an image, in the same size.

    Raises:
        UserError: a file that cannot be read, or teachers of other classes, or that see other parts of an image.
    """
    members = [open_trained(path, arch) for path in paths]
    if img_size is not None:
        members = [_at_size(member, img_size) for member in members]
    first = members[0]
    for other in members[1:]:
        if other.num_classes != first.num_classes:
            raise UserError(
                f"{other.path} has {other.num_classes} classes, but {first.path} has {first.num_classes}: give "
                "teachers of the same classes"
            )
        if first.classes and other.classes and first.classes != other.classes:
            raise UserError(
                f"{other.path} has other classes than {first.path}, or in another order: give teachers of the same "
                "classes"
            )
        if one_cut and _cut(other.preprocessing) != _cut(first.preprocessing):
            raise UserError(
                f"{other.path} gets images as {other.preprocessing}, but {first.path} as {first.preprocessing}: score "
                "with each of them alone"
            )
    for member in members:
        member.network.to(device).requires_grad_(False)
    return Teachers(members, device)


def _at_size(member: Trained, size: int) -> Trained:
    """Return a teacher that sees images of another size.

    Raises:
        UserError: it cannot.
    """
    fit_size(member.network, size)
    try:
        with torch.inference_mode():
            member.network(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        raise UserError(f"{member.path} does not run at --img-size {size}: {' '.join(str(error).split())}") from error
    return replace(member, preprocessing=member.preprocessing.at(size))


def _cut(seen: Preprocessing) -> tuple[int, int, str, str]:
    return seen.img_size, seen.resize, seen.crop, seen.interpolation


def best_classes(log_probabilities: Tensor, top: int) -> tuple[list[list[int]], list[list[float]]]:
    """Return the `top` likeliest classes of each row and their values, the smaller index first among equals."""
    values, classes = log_probabilities.sort(stable=True, dim=1, descending=True)
    return classes[:, :top].tolist(), values[:, :top].tolist()


def usable(paths: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return each path once, in order, and why others cannot stand in a table or a list, by path."""
    kept, causes = [], {}
    for path in dict.fromkeys(paths):
        if any(letter in path for letter in "\n\r"):
            causes[path] = "its name has a line end: rename it"
        elif not _is_text(path):
            causes[path] = "its name is no UTF-8 text: rename it"
        else:
            kept.append(path)
    return kept, causes


def _is_text(path: str) -> bool:
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


@dataclass
class Pace:
    """Images that were scored, and when the rest will be.

    Args:
        total: images to do.
        clock: seconds.
    """

    total: int
    clock: Callable[[], float] = time.monotonic
    done: int = 0

    def __post_init__(self) -> None:
        self._start = self.clock()

    def line(self) -> str:
        """Return "12.3 images/s, 0:00:40 left, until 14:32:10"."""
        rate = self.done / max(self.clock() - self._start, 1e-9)
        left = timedelta(seconds=round((self.total - self.done) / rate)) if rate else None
        end = "" if left is None else f", {left} left, until {datetime.now() + left:%H:%M:%S}"
        return f"{rate:.1f} images/s{end}"


@dataclass(frozen=True)
class Work:
    """What one process is to do.

    Args:
        folder: of the shards.
        plan: of the folder.
        paths: of all images.
        rank: of this process.
        size: number of processes.
        batch_size: images of a batch.
        workers: loading processes.
    """

    folder: Path
    plan: Plan
    paths: Sequence[str]
    rank: int
    size: int
    batch_size: int
    workers: int

    def order(self) -> list[int]:
        """Return all shards, those of this rank first; the others are taken where nobody works on them."""
        return shard_order(self.plan.num_shards, self.rank, self.size)

    def images(self, number: int) -> Sequence[str]:
        """Return the images of a shard."""
        return self.paths[number * self.plan.shard_size : (number + 1) * self.plan.shard_size]


def score(work: Work, teachers: Teachers, advance: Callable[[int], None]) -> Iterator[tuple[int, dict[str, str]]]:
    """Score the shards that are missing; yield the number of each that was done and its unreadable images.

    Args:
        work: what to do.
        teachers: who scores.
        advance: called with the number of images after each batch.
    """
    for number in work.order():
        with claimed(work.folder, number) as file:
            if file is None:
                continue
            rows: list[Row] = []
            unreadable: dict[str, str] = {}
            batches = read_batches(work.images(number), teachers.seen, work.batch_size, work.workers)
            with torch.inference_mode():
                for batch in batches:
                    unreadable.update(batch.unreadable)
                    rows += _rows(batch, teachers, work.plan.top)
                    advance(len(batch.paths) + len(batch.unreadable))
            finish(file, work.folder, number, encode(rows, work.plan, unreadable))
        yield number, unreadable


def _rows(batch: PixelBatch, teachers: Teachers, top: int) -> list[Row]:
    if not batch.paths:
        return []
    log_probabilities, energy = teachers.scores(batch.pixels)
    classes, values = best_classes(log_probabilities, top)
    scored = zip(batch.paths, classes, values, energy.tolist(), strict=True)
    return [Row(path, file_digest(path), path_hash(path), *found) for path, *found in scored]


def unreadable_lines(unreadable: Mapping[str, str]) -> list[str]:
    """Return a line per image that could not be read."""
    return [f"image {path} is left out ({cause})" for path, cause in unreadable.items()]
