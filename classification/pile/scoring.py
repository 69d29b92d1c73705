"""Score images by one teacher, or by the average of several, shard by shard."""

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
from classification.pile.shards import Plan, Row, claim_shard, encode_shard, finish_shard, path_hash, shard_order
from mgd import logits_of


@dataclass(frozen=True)
class Teachers:
    """Networks with the same classes and preprocessing, whose probabilities are averaged.

    Args:
        members: the networks, in eval mode.
        device: of the networks.
    """

    members: list[Trained]
    device: torch.device

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of the first teacher; the others may differ in mean and std."""
        return self.members[0].preprocessing

    def scores(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (B, K) and energies (B,) of bytes (B, H, W, 3), float32, on the CPU.

        For n teachers, the log-probabilities are log((1/n) sum_i softmax(logits_i)). The energy is the mean
        -(1/n) sum_i log sum_k exp(logits_ik), which is high for images unlike the training images. For a network of
        another image size, the images are resized.

        Reference: Liu et al., Energy-based Out-of-distribution Detection, 2020, arXiv:2010.03759, equation 4 with T 1.

        Raises:
            RunError: outputs are not finite, or the batch is too large for the memory.
        """
        log_probabilities, energies = [], []
        try:
            for member in self.members:
                images = member.preprocessing.normalise(pixels.to(self.device))
                side = member.preprocessing.img_size
                if images.shape[2] != side:
                    images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
                weight = next(member.network.parameters())
                logits = logits_of(member.network(images.to(weight.dtype).contiguous())).float()
                energies.append(-logits.logsumexp(1))
                log_probabilities.append(logits.log_softmax(1))
        except torch.OutOfMemoryError as error:
            raise RunError(f"a batch of {len(pixels)} images needs too much memory: lower -b") from error
        mean = (
            log_probabilities[0]
            if len(log_probabilities) == 1
            else torch.stack(log_probabilities).logsumexp(0) - math.log(len(log_probabilities))
        )
        energy = torch.stack(energies).mean(0)
        if not (mean.isfinite().all() and energy.isfinite().all()):
            raise RunError("the teacher's outputs are not finite: are its weights damaged?")
        return mean.cpu(), energy.cpu()

    def at(self, size: int) -> Teachers:
        """Return the teachers for images of another size; the networks are changed in place if necessary.

        Raises:
            UserError: a teacher cannot process this size.
        """
        return Teachers([_at_size(member, size) for member in self.members], self.device)

    def digest(self) -> str:
        """Return a hash of the networks' weights and preprocessing: 32 hexadecimal digits."""
        return networks_digest(self.members)


def open_teachers(
    paths: Sequence[Path],
    arch: str | None,
    device: torch.device,
    img_size: int | None = None,
    *,
    same_crop: bool = True,
) -> Teachers:
    """Load teachers and move them to a device.

    Args:
        paths: the checkpoints.
        arch: name of their network, if the files do not say it.
        device: of the teachers.
        img_size: side of their square input, in pixels; None for their own.
        same_crop: whether all must resize and crop images in the same way.

    Raises:
        UserError: a file cannot be read, or the teachers have different classes, or prepare images differently.
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
        if same_crop and _resize_and_crop(other.preprocessing) != _resize_and_crop(first.preprocessing):
            raise UserError(
                f"{other.path} gets images as {other.preprocessing}, but {first.path} as {first.preprocessing}: score "
                "with each of them alone"
            )
    for member in members:
        member.network.to(device).requires_grad_(False)
    return Teachers(members, device)


def _at_size(member: Trained, size: int) -> Trained:
    """Return a teacher for images of another size.

    Raises:
        UserError: the network cannot process this size.
    """
    fit_size(member.network, size)
    try:
        with torch.inference_mode():
            member.network(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        raise UserError(f"{member.path} does not run at --img-size {size}: {' '.join(str(error).split())}") from error
    return replace(member, preprocessing=member.preprocessing.at(size))


def _resize_and_crop(preprocessing: Preprocessing) -> tuple[int, int, str, str]:
    return preprocessing.img_size, preprocessing.resize, preprocessing.crop, preprocessing.interpolation


def best_classes(log_probabilities: Tensor, top: int) -> tuple[list[list[int]], list[list[float]]]:
    """Return the `top` likeliest classes of each row and their values; of equal values, the smaller index is first."""
    values, classes = log_probabilities.sort(stable=True, dim=1, descending=True)
    return classes[:, :top].tolist(), values[:, :top].tolist()


def usable_paths(paths: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return each usable path once, in order, and {path: cause} of those that cannot be written into a list."""
    paths_kept, causes = [], {}
    for path in dict.fromkeys(paths):
        if any(letter in path for letter in "\n\r"):
            causes[path] = "its name has a line end: rename it"
        elif not _is_text(path):
            causes[path] = "its name is no UTF-8 text: rename it"
        else:
            paths_kept.append(path)
    return paths_kept, causes


def _is_text(path: str) -> bool:
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


@dataclass
class Pace:
    """The speed of scoring, and the time that is left.

    Args:
        total: number of images to score.
        clock: returns seconds.
        done: number of images that are scored.
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
class ScoreWork:
    """The work of one process.

    Args:
        folder: of the shards.
        plan: of the folder.
        paths: of all images.
        rank: of this process.
        size: number of processes.
        batch_size: number of images in a batch.
        workers: number of loading processes.
    """

    folder: Path
    plan: Plan
    paths: Sequence[str]
    rank: int
    size: int
    batch_size: int
    workers: int

    def order(self) -> list[int]:
        """Return all shards, those of this rank first; it scores others too if no other process does."""
        return shard_order(self.plan.num_shards, self.rank, self.size)

    def images(self, number: int) -> Sequence[str]:
        """Return the images of a shard."""
        return self.paths[number * self.plan.shard_size : (number + 1) * self.plan.shard_size]


def score(work: ScoreWork, teachers: Teachers, advance: Callable[[int], None]) -> Iterator[tuple[int, dict[str, str]]]:
    """Score the missing shards; yield the number of each when it is complete, and its unreadable images.

    Args:
        work: what to score.
        teachers: the teachers.
        advance: called after each batch with its number of images.
    """
    for number in work.order():
        with claim_shard(work.folder, number) as file:
            if file is None:
                continue
            rows: list[Row] = []
            unreadable: dict[str, str] = {}
            batches = read_batches(work.images(number), teachers.preprocessing, work.batch_size, work.workers)
            with torch.inference_mode():
                for batch in batches:
                    unreadable.update(batch.unreadable)
                    rows += _rows(batch, teachers, work.plan.top)
                    advance(len(batch.paths) + len(batch.unreadable))
            finish_shard(file, work.folder, number, encode_shard(rows, work.plan, unreadable))
        yield number, unreadable


def _rows(batch: PixelBatch, teachers: Teachers, top: int) -> list[Row]:
    if not batch.paths:
        return []
    log_probabilities, energy = teachers.scores(batch.pixels)
    classes, values = best_classes(log_probabilities, top)
    scored = zip(batch.paths, classes, values, energy.tolist(), strict=True)
    return [Row(path, file_digest(path), path_hash(path), *found) for path, *found in scored]


def unreadable_lines(unreadable: Mapping[str, str]) -> list[str]:
    """Return one line per image that could not be read."""
    return [f"image {path} is left out ({cause})" for path, cause in unreadable.items()]
