"""Store the outputs of teachers for many views of every image, shard by shard, and check stored outputs."""

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
from classification.pile.shards import claim_shard, finish_shard, prepare_folder, shard_order
from classification.system.interrupt import outlast
from classification.system.new_files import write_whole
from mgd import Taps, fold_norms, keep_top, probe

SHARD_BYTES = 8000  # bytes of a shard without its rows: Parquet's description of each column
CLASSIFIER_BYTES = 1000  # per image; larger last layers of the teachers are not stored
CHECK_EVERY = 100  # `check_stored` scores one of this number of images again
TOLERANCES = {"float32": 0.01, "float16": 0.03, "bfloat16": 0.1}  # allowed difference of probabilities, by number type


@dataclass(frozen=True)
class StoreWork:
    """The work of one process.

    Args:
        folder: of the shards.
        plan: of the folder.
        root: the data folder.
        paths: of all images, relative to `root`.
        rank: of this process.
        size: number of processes.
        batch_size: number of views in a batch.
        workers: number of loading processes.
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
        """Return all shards, those of this rank first; it stores others too if no other process does."""
        return shard_order(self.plan.num_shards, self.rank, self.size)

    def images(self, number: int) -> range:
        """Return the numbers of the images of a shard."""
        start = number * self.plan.shard_size
        return range(start, min(start + self.plan.shard_size, self.plan.num_images))

    def missing(self) -> list[int]:
        """Return the shards that do not exist yet."""
        return [number for number in self.order() if not exists(self.folder / shard_name(number))]


def render_versions() -> dict[str, str]:
    """Return the versions of the code that renders views, on which their pixels depend."""
    return {"views": str(VIEWS), "torch": version("torch"), "torchvision": version("torchvision")}


def bytes_per_image(plan: StoredPlan, paths: Sequence[str]) -> float:
    """Return about how many bytes an image needs on disk, without compression."""
    views, label_bytes = plan.views, 2 if plan.num_classes <= 1 << 16 else 4
    view_bytes = 8 + 0.125 + 4 * views.changes_colours + (8 * bool(views.cutmix) + 6) * views.mixes
    sample_bytes = view_bytes + (label_bytes + 2) * plan.top + 2
    shard_bytes = SHARD_BYTES + 2 * len(plan.text())
    return (
        plan.samples * sample_bytes
        + 32
        + sum(map(len, paths)) / len(paths)
        + shard_bytes / min(plan.shard_size, plan.num_images)
    )


def classifier_bytes(teachers: Teachers) -> bytes | None:
    """Return the normalised rows of the teachers' last linear layers, side by side, as a NumPy file.

    The cosine of two rows is the mean of the teachers' cosines. None if a teacher has no such layer.
    """
    layers = []
    for member in teachers.members:
        side = member.preprocessing.img_size
        rows = probe(member.network, torch.zeros(1, 3, side, side, device=teachers.device)).classifier
        if rows is None:
            return None
        layers.append(F.normalize(rows.float(), dim=1).cpu())
    buffer = io.BytesIO()
    np.save(buffer, F.normalize(torch.cat(layers, dim=1), dim=1).half().numpy())
    return buffer.getvalue()


def begin_folder(work: StoreWork, classifier: bytes | None, free: int | None = None) -> None:
    """Make the folder and write its plan, or check that an existing folder has the same plan.

    Args:
        work: what to store.
        classifier: result of `classifier_bytes`, which is stored in the folder too.
        free: bytes of free disk space; by default, those that the system reports.

    Raises:
        UserError: the folder contains something else, cannot be written to, or its disk is too small.
    """
    folder = work.folder
    if not prepare_folder(folder, PLAN, "stored outputs", (CLASSIFIER,)):
        write_whole(folder / PLAN, work.plan.text().encode())
    check_plan(folder, read_stored_plan(folder), work.plan)
    if classifier is not None and not exists(folder / CLASSIFIER):
        write_whole(folder / CLASSIFIER, classifier)
    needed = bytes_per_image(work.plan, work.paths) * sum(len(work.images(number)) for number in work.missing())
    free = shutil.disk_usage(folder).free if free is None else free
    if free < needed:
        raise UserError(
            f"--output {folder} needs {needed / 1000000.0:.1f} MB, but only {free / 1000000.0:.1f} MB are free: make "
            "room, or lower --samples or --top-k"
        )


def check_plan(folder: Path, old: StoredPlan, new: StoredPlan) -> None:
    """Check that the plan of a folder is the plan of this command.

    Raises:
        UserError: it is not; the message says what differs.
    """
    descriptions = {
        "teacher": "another teacher",
        "dtype": f"--teacher-dtype {old.dtype}",
        "classes": "other classes",
        "top": f"--top-k {old.top}",
        "samples": f"--samples {old.samples}",
        "seed": f"--seed {old.seed}",
        "num_images": f"{old.num_images} images, now {new.num_images}",
        "images": "other images, or in another order",
        "shard_size": f"--shard-size {old.shard_size}",
    }
    differences = [text for name, text in descriptions.items() if getattr(old, name) != getattr(new, name)]
    for entry in fields(old.views):
        value = getattr(old.views, entry.name)
        if value != getattr(new.views, entry.name):
            differences.append(f"--{entry.name.replace('_', '-')} {value}")
    differences += [f"teachers that see {', '.join(map(str, old.sizes))} px"] if old.sizes != new.sizes else []
    for name, value in new.versions.items():
        if old.versions.get(name) != value:
            differences.append(f"{name} {old.versions.get(name)}")
    if differences:
        raise UserError(
            f"{folder} was begun with {', '.join(differences[:2])}: type the same line to resume, or give another "
            "folder"
        )


class _ViewsOfImages(Dataset[tuple[Tensor, Tensor, str]]):
    """Per image, all views as (N, S, S, 3) bytes, their numbers as bytes, and the digest of the file."""

    def __init__(self, work: StoreWork, numbers: Sequence[int]) -> None:
        self.work, self.numbers, self.render = work, numbers, Renderer(work.plan.views)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, str]:
        number, plan = self.numbers[position], self.work.plan
        path = str(self.work.root / self.work.paths[number])
        image = self._decoded(path)
        views, rendered = np.empty(plan.samples, VIEW), []
        for sample in range(plan.samples):
            view = views[sample] = self._draw(number, sample, image)
            picture = self.render(image, view, path)
            if int(view["partner"]) != number:
                picture = mix_views(picture, self._partner(int(view["partner"]), sample), view)
            rendered.append(picture.permute(1, 2, 0))
        numbers = torch.from_numpy(views.view(np.uint8).reshape(plan.samples, VIEW.itemsize))
        return torch.stack(rendered).contiguous(), numbers, file_digest(path)

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


def make_fast(teachers: Teachers, dtype: str) -> Teachers:
    """Make teachers fast: fold their norms and convert them to a number type; the networks are changed in place."""
    for member in teachers.members:
        side = member.preprocessing.img_size
        images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(teachers.device)
        fold_norms(Taps(member.network), images)
        member.network.to(getattr(torch, dtype)).to(memory_format=torch.channels_last)
    return teachers


def store_shards(work: StoreWork, teachers: Teachers, advance: Callable[[int], None]) -> Iterator[int]:
    """Store the missing shards; yield the number of each when it is complete.

    Args:
        work: what to store.
        teachers: as `make_fast` returns them.
        advance: called after each batch with its number of views.
    """
    for number in work.order():
        with claim_shard(work.folder, number) as file:
            if file is None:
                continue
            block = compute_outputs(work, work.images(number), teachers, advance)
            finish_shard(file, work.folder, number, encode_block(block, work.plan))
        yield number


@torch.inference_mode()
def compute_outputs(
    work: StoreWork, numbers: Sequence[int], teachers: Teachers, advance: Callable[[int], None]
) -> Block:
    """Return the teachers' outputs for all views of some images; the arguments are those of `store_shards`."""
    plan, batch_size = work.plan, work.batch_size
    images = max(1, batch_size // plan.samples)  # per batch
    workers = min(work.workers, (len(numbers) - 1) // images)  # to start a process takes longer than to read one batch
    loading = DataLoader(
        _ViewsOfImages(work, numbers), images, num_workers=workers, worker_init_fn=outlast, generator=torch.Generator()
    )
    parts: list[tuple[NDArray[Any], ...]] = []
    hashes: list[str] = []
    for pixels, numbers_of_views, digests in explain_worker_errors(loading, workers):
        for batch, views in zip(
            pixels.flatten(0, 1).split(batch_size), numbers_of_views.flatten(0, 1).split(batch_size), strict=True
        ):
            classes, values, rest = keep_top(teachers.scores(batch)[0], plan.top)
            outputs = (classes.numpy(), values.half().numpy(), rest.half().numpy())
            parts.append((np.ascontiguousarray(views.numpy()).view(VIEW)[:, 0], *outputs))
            advance(len(batch))
        hashes += digests
    arrays = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Block([work.paths[number] for number in numbers], hashes, *arrays)


def check_stored(work: StoreWork, teachers: Teachers) -> str:
    """Score one of a hundred images again, and compare the outputs with the stored ones; return one line about it.

    Raises:
        UserError: the folder is incomplete.
        RunError: the stored outputs differ.
    """
    stored, plan = open_stored(work.folder), work.plan
    check_plan(work.folder, stored.plan, plan)
    numbers = range(0, plan.num_images, CHECK_EVERY)
    new = compute_outputs(work, numbers, teachers, lambda _: None)
    rows = np.concatenate([np.arange(plan.samples) + number * plan.samples for number in numbers])
    changed_paths = [path for path, digest, number in zip(new.paths, new.hashes, numbers, strict=True)
               if digest != stored.block.hashes[number]]  # fmt: skip
    if changed_paths:
        raise RunError(f"{changed_paths[0]} has changed since it was stored: store the teacher again")
    old = stored.block
    drawn_differently = (new.views != old.views[rows]).reshape(len(numbers), -1).any(axis=1)
    if drawn_differently.any():
        raise RunError(
            f"the views of {new.paths[int(drawn_differently.argmax())]} would be drawn differently now: store the "
            "teacher again"
        )
    differences = np.abs(
        _dense_probabilities(old, rows, plan.num_classes)
        - _dense_probabilities(new, np.arange(len(rows)), plan.num_classes)
    )
    largest = float(differences.max())
    if not largest <= TOLERANCES[plan.dtype]:
        first = new.paths[int(differences.reshape(len(numbers), -1).max(axis=1).argmax())]
        raise RunError(
            f"stored probabilities of {first} differ from the teacher's by {largest:.3g}, and "
            f"{TOLERANCES[plan.dtype]} is allowed: store the teacher again"
        )
    return f"{len(rows)} samples of {len(numbers)} images scored again: probabilities differ by {largest:.2g} at most"


def _dense_probabilities(block: Block, rows: NDArray[np.int64], num_classes: int) -> NDArray[np.float32]:
    """Return probabilities (rows, K); they are 0 for classes that are not stored."""
    probabilities = np.zeros((len(rows), num_classes), np.float32)
    values = np.exp(block.log_probabilities[rows].astype(np.float32))
    np.put_along_axis(probabilities, block.classes[rows].astype(np.int64), values, axis=1)
    return probabilities
