"""Store what teachers say of many views of every image, shard by shard, and compare it with what they say now."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from classification.data.image_files import file_digest
from classification.data.images import read_image, to_bytes
from classification.data.loading import explain_worker_errors
from classification.data.stored import CLASSIFIER, Block, encode_block, open_stored, shard_name
from classification.data.stored_views import MAX_SIDE, VIEW, Renderer, draw_view, mix_views
from classification.errors import RunError, UserError
from classification.options.stored_teacher import PLAN, VIEWS, StoredPlan, read_stored_plan
from classification.paths import exists
from classification.pile.scoring import Teachers
from classification.pile.shards import claimed, finish, has_plan, shard_order
from classification.system.interrupt import outlast
from classification.system.new_files import write_whole
from mgd import Taps, fold_norms, keep_top, probe

SHARD_BYTES = 8000  # bytes of a shard beside its rows: Parquet's description of each column
CLASSIFIER_BYTES = 1000  # per image at most of the teachers' last layers, for wkd_logits
CHECKED = 100  # one image of so many is scored again by `check`
CLOSE = {"float32": 0.01, "float16": 0.03, "bfloat16": 0.1}  # probabilities that count as equal, by number type


@dataclass(frozen=True)
class Storing:
    """What one process is to store.

    Args:
        folder: of the shards.
        plan: of the folder.
        root: the data folder.
        paths: of all images, relative to `root`.
        rank: of this process.
        size: number of processes.
        batch_size: views of a batch.
        workers: loading processes.
    """

    folder: Path
    plan: StoredPlan
    root: Path
    paths: Sequence[str]
    rank: int
    size: int
    batch_size: int
    workers: int

    def order(self) -> list[int]:
        """Return all shards, those of this rank first; the others are taken where nobody works on them."""
        return shard_order(self.plan.num_shards, self.rank, self.size)

    def images(self, number: int) -> range:
        """Return the numbers of the images of a shard."""
        start = number * self.plan.shard_size
        return range(start, min(start + self.plan.shard_size, self.plan.num_images))

    def missing(self) -> list[int]:
        """Return the shards that are not there."""
        return [number for number in self.order() if not exists(self.folder / shard_name(number))]


def versions() -> dict[str, str]:
    """Return what the pixels of a view depend on beside its numbers."""
    return {"views": str(VIEWS), "torch": version("torch"), "torchvision": version("torchvision")}


def bytes_per_image(plan: StoredPlan, paths: Sequence[str]) -> float:
    """Return about how many bytes an image takes on disk: its numbers as they are, before they are compressed."""
    views, label = plan.views, 2 if plan.num_classes <= 1 << 16 else 4
    view = 8 + 0.125 + 4 * views.changes_colours + (8 * bool(views.cutmix) + 6) * views.mixes
    sample = view + (label + 2) * plan.top + 2
    shard = SHARD_BYTES + 2 * len(plan.text())
    return (
        plan.samples * sample + 32 + sum(map(len, paths)) / len(paths) + shard / min(plan.shard_size, plan.num_images)
    )


def classifier_of(teachers: Teachers) -> bytes | None:
    """Return the rows of the teachers' last linear layers, of length 1 and side by side, as a file for NumPy.

    The cosine of two such rows is the mean over the teachers of that of their own. None where one has no such layer.
    """
    found = []
    for member in teachers.members:
        side = member.preprocessing.img_size
        rows = probe(member.network, torch.zeros(1, 3, side, side, device=teachers.device)).classifier
        if rows is None:
            return None
        found.append(F.normalize(rows.float(), dim=1).cpu())
    buffer = io.BytesIO()
    np.save(buffer, F.normalize(torch.cat(found, dim=1), dim=1).half().numpy())
    return buffer.getvalue()


def begin(work: Storing, classifier: bytes | None, free: int | None = None) -> None:
    """Make the folder and write its plan, or check that it was begun with the same one.

    Args:
        work: what to store.
        classifier: as `classifier_of` returns it, a further file of the folder.
        free: bytes of the disk that are free; what the system says by default.

    Raises:
        UserError: the folder holds something else, cannot be written to, or its disk is too small.
    """
    folder = work.folder
    if not has_plan(folder, PLAN, "stored outputs", (CLASSIFIER,)):
        write_whole(folder / PLAN, work.plan.text().encode())
    compare(folder, read_stored_plan(folder), work.plan)
    if classifier is not None and not exists(folder / CLASSIFIER):
        write_whole(folder / CLASSIFIER, classifier)
    need = bytes_per_image(work.plan, work.paths) * sum(len(work.images(number)) for number in work.missing())
    free = shutil.disk_usage(folder).free if free is None else free
    if free < need:
        raise UserError(
            f"--output {folder} needs {need / 1000000.0:.1f} MB, but only {free / 1000000.0:.1f} MB are free: make "
            "room, or lower --samples or --top-k"
        )


def compare(folder: Path, then: StoredPlan, now: StoredPlan) -> None:
    """Refuse a folder that was begun with another plan.

    Raises:
        UserError: naming what differs.
    """
    words = {
        "teacher": "another teacher",
        "dtype": f"--teacher-dtype {then.dtype}",
        "classes": "other classes",
        "top": f"--top-k {then.top}",
        "samples": f"--samples {then.samples}",
        "seed": f"--seed {then.seed}",
        "num_images": f"{then.num_images} images, now {now.num_images}",
        "images": "other images, or in another order",
        "shard_size": f"--shard-size {then.shard_size}",
    }
    different = [text for name, text in words.items() if getattr(then, name) != getattr(now, name)]
    for entry in fields(then.views):
        value = getattr(then.views, entry.name)
        if value != getattr(now.views, entry.name):
            different.append(f"--{entry.name.replace('_', '-')} {value}")
    different += [f"teachers that see {', '.join(map(str, then.sizes))} px"] if then.sizes != now.sizes else []
    for name, value in now.versions.items():
        if then.versions.get(name) != value:
            different.append(f"{name} {then.versions.get(name)}")
    if different:
        raise UserError(
            f"{folder} was begun with {', '.join(different[:2])}: type the same line to resume, or give another folder"
        )


class _Images(Dataset[tuple[Tensor, Tensor, str]]):
    """All views of an image as (N, S, S, 3) bytes, the bytes of their numbers, and the digest of the file."""

    def __init__(self, work: Storing, numbers: Sequence[int]) -> None:
        self.work, self.numbers, self.render = work, numbers, Renderer(work.plan.views)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, str]:
        number, plan = self.numbers[position], self.work.plan
        path = str(self.work.root / self.work.paths[number])
        image = self._decoded(path)
        views, seen = np.empty(plan.samples, VIEW), []
        for sample in range(plan.samples):
            view = views[sample] = self._draw(number, sample, image)
            made = self.render(image, view, path)
            if int(view["partner"]) != number:
                made = mix_views(made, self._partner(int(view["partner"]), sample), view)
            seen.append(made.permute(1, 2, 0))
        numbers = torch.from_numpy(views.view(np.uint8).reshape(plan.samples, VIEW.itemsize))
        return torch.stack(seen).contiguous(), numbers, file_digest(path)

    def _draw(self, number: int, sample: int, image: Tensor) -> NDArray[Any]:
        plan = self.work.plan
        size = (image.shape[1], image.shape[2])
        return draw_view(plan.views, plan.seed, number, sample, size, plan.num_images)

    def _partner(self, number: int, sample: int) -> Tensor:
        path = str(self.work.root / self.work.paths[number])
        image = self._decoded(path)
        return self.render(image, self._draw(number, sample, image), path)

    def _decoded(self, path: str) -> Tensor:
        image = to_bytes(read_image(path)).permute(2, 0, 1)
        if max(image.shape) > MAX_SIDE:
            raise UserError(f"image {path} has a side of {max(image.shape)} px, more than {MAX_SIDE}: leave it out")
        return image


def fast(teachers: Teachers, dtype: str) -> Teachers:
    """Return teachers in their fastest form: norms folded, in this number type; their networks are changed."""
    for member in teachers.members:
        side = member.preprocessing.img_size
        images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(teachers.device)
        fold_norms(Taps(member.network), images)
        member.network.to(getattr(torch, dtype)).to(memory_format=torch.channels_last)
    return teachers


def store(work: Storing, teachers: Teachers, advance: Callable[[int], None]) -> Iterator[int]:
    """Store the shards that are missing; yield the number of each that was done.

    Args:
        work: what to do.
        teachers: as `fast` returns them.
        advance: called with the number of views after each batch.
    """
    for number in work.order():
        with claimed(work.folder, number) as file:
            if file is None:
                continue
            block = said_of(work, work.images(number), teachers, advance)
            finish(file, work.folder, number, encode_block(block, work.plan))
        yield number


@torch.inference_mode()
def said_of(work: Storing, numbers: Sequence[int], teachers: Teachers, advance: Callable[[int], None]) -> Block:
    """Return what the teachers say of all views of some images; the arguments are those of `store`."""
    plan, most = work.plan, work.batch_size
    images = max(1, most // plan.samples)  # of a batch
    workers = min(work.workers, (len(numbers) - 1) // images)  # a process costs more than the batch it would read
    loading = DataLoader(
        _Images(work, numbers), images, num_workers=workers, worker_init_fn=outlast, generator=torch.Generator()
    )
    parts: list[tuple[NDArray[Any], ...]] = []
    hashes: list[str] = []
    for pixels, drawn, digests in explain_worker_errors(loading, workers):
        for seen, views in zip(pixels.flatten(0, 1).split(most), drawn.flatten(0, 1).split(most), strict=True):
            classes, values, rest = keep_top(teachers.scores(seen)[0], plan.top)
            kept = (classes.numpy(), values.half().numpy(), rest.half().numpy())
            parts.append((np.ascontiguousarray(views.numpy()).view(VIEW)[:, 0], *kept))
            advance(len(seen))
        hashes += digests
    arrays = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Block([work.paths[number] for number in numbers], hashes, *arrays)


def check(work: Storing, teachers: Teachers) -> str:
    """Score one image of a hundred again, and compare all of its samples with what is stored; return a line about it.

    Raises:
        UserError: the folder is not complete.
        RunError: it holds something else.
    """
    stored, plan = open_stored(work.folder), work.plan
    compare(work.folder, stored.plan, plan)
    numbers = range(0, plan.num_images, CHECKED)
    now = said_of(work, numbers, teachers, lambda _: None)
    rows = np.concatenate([np.arange(plan.samples) + number * plan.samples for number in numbers])
    changed = [path for path, own, number in zip(now.paths, now.hashes, numbers, strict=True)
               if own != stored.block.hashes[number]]  # fmt: skip
    if changed:
        raise RunError(f"{changed[0]} has changed since it was stored: store the teacher again")
    then = stored.block
    other = (now.views != then.views[rows]).reshape(len(numbers), -1).any(axis=1)
    if other.any():
        raise RunError(
            f"the views of {now.paths[int(other.argmax())]} would be drawn differently now: store the teacher again"
        )
    apart = np.abs(_dense(then, rows, plan.num_classes) - _dense(now, np.arange(len(rows)), plan.num_classes))
    most = float(apart.max())
    if not most <= CLOSE[plan.dtype]:
        first = now.paths[int(apart.reshape(len(numbers), -1).max(axis=1).argmax())]
        raise RunError(
            f"stored probabilities of {first} differ from the teacher's by {most:.3g}, and {CLOSE[plan.dtype]} is "
            "allowed: store the teacher again"
        )
    return f"{len(rows)} samples of {len(numbers)} images scored again: probabilities differ by {most:.2g} at most"


def _dense(block: Block, rows: NDArray[np.int64], num_classes: int) -> NDArray[np.float32]:
    """Return the probabilities (rows, K) of the classes that are kept, 0 of the others."""
    found = np.zeros((len(rows), num_classes), np.float32)
    values = np.exp(block.log_probabilities[rows].astype(np.float32))
    np.put_along_axis(found, block.classes[rows].astype(np.int64), values, axis=1)
    return found
