"""A teacher's stored outputs: write and read the Parquet shards, and serve views of images with these outputs.

The format is in docs/start/stored_teachers.md.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from classification.data.stored_views import VIEW, Renderer, mix_views
from classification.data.unequal import REPEAT
from classification.errors import UserError
from classification.options.stored_teacher import StoredPlan, read_stored_plan
from classification.paths import exists

if TYPE_CHECKING:
    import pyarrow as pa


CLASSIFIER = "classifier.npy"


@dataclass(frozen=True)
class Block:
    """The teacher's outputs for some images; every image has N samples (views), one after the other.

    Args:
        paths: of the images, relative to the data folder.
        hashes: the first 32 hexadecimal digits of the BLAKE2b of each file.
        views: (images * N,) of `VIEW`.
        classes: (images * N, k), the k likeliest classes, best first.
        log_probabilities: (images * N, k) float16.
        rest: (images * N,) float16, log of the total probability of all other classes.
    """

    paths: list[str]
    hashes: list[str]
    views: NDArray[Any]
    classes: NDArray[Any]
    log_probabilities: NDArray[np.float16]
    rest: NDArray[np.float16]


def shard_name(number: int) -> str:
    """Return the name of the file of shard `number`."""
    return f"{number:06d}.parquet"


def shard_schema(plan: StoredPlan) -> pa.Schema:
    """Return the columns of a shard, which has one row per sample, and the plan as its metadata."""
    import pyarrow as pa

    view = [(name, pa.from_numpy_dtype(VIEW[name])) for name in VIEW.names or ()]
    label = pa.uint16() if plan.num_classes <= 1 << 16 else pa.uint32()
    outputs = [
        ("classes", pa.list_(label, plan.top)),
        ("log_probabilities", pa.list_(pa.float16(), plan.top)),
        ("rest", pa.float16()),
    ]
    names = [("path", pa.string()), ("hash", pa.string()), ("sample", pa.uint16())]
    return pa.schema([*names, *view, *outputs], {"mgd.format": str(plan.format), "mgd.plan": plan.text()})


def encode_block(block: Block, plan: StoredPlan) -> bytes:
    """Return the content of a shard's Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = shard_schema(plan)
    label = columns.field("classes").type.value_type
    flat = {
        "classes": pa.array(block.classes.reshape(-1).astype(label.to_pandas_dtype()), label),
        "log_probabilities": pa.array(block.log_probabilities.reshape(-1), pa.float16()),
    }
    values: dict[str, Any] = {
        "path": np.repeat(np.array(block.paths, dtype=object), plan.samples),
        "hash": np.repeat(np.array(block.hashes, dtype=object), plan.samples),
        "sample": np.tile(np.arange(plan.samples, dtype=np.uint16), len(block.paths)),
        **{name: block.views[name] for name in VIEW.names or ()},
        **{name: pa.FixedSizeListArray.from_arrays(array, plan.top) for name, array in flat.items()},
        "rest": block.rest,
    }
    table = pa.table(
        [pa.array(values[name], field.type) for name, field in zip(columns.names, columns, strict=True)], columns
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", compression_level=9)
    return buffer.getvalue()


def read_block(path: Path, plan: StoredPlan, number: int) -> Block:
    """Read a shard.

    Args:
        path: its file.
        plan: of its folder.
        number: of the shard.

    Raises:
        UserError: the file is damaged, or of another plan.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, use_threads=True)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path} is not a Parquet file, or is damaged: remove it, and store it again with mgd reinforce"
        ) from error
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    columns = shard_schema(plan)
    if metadata.get("mgd.plan") != plan.text() or not table.schema.equals(columns):
        raise UserError(
            f"{path} belongs to another cache, or was changed: remove it, and store it again with mgd reinforce"
        )
    images = min(plan.shard_size, plan.num_images - number * plan.shard_size)
    rows = images * plan.samples
    samples = table.column("sample").to_numpy()
    if len(table) != rows or (samples.reshape(images, plan.samples) != np.arange(plan.samples)).any():
        raise UserError(
            f"{path} has {len(table)} rows, expected {rows}: remove it, and store it again with mgd reinforce"
        )
    views = np.empty(rows, VIEW)
    for name in VIEW.names or ():
        views[name] = table.column(name).to_numpy()
    lists = {
        name: table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(rows, plan.top)
        for name in ("classes", "log_probabilities")
    }
    rest = table.column("rest").to_numpy()
    if lists["classes"].max() >= plan.num_classes or views["partner"].max() >= plan.num_images:
        raise UserError(f"{path} names unknown classes or images: remove it, and store it again")
    if np.isnan(rest).any() or not np.isfinite(lists["log_probabilities"]).all():
        raise UserError(f"{path} holds log-probabilities that are not finite: remove it, and store it again")
    firsts = pa.array(np.arange(0, rows, plan.samples))
    names = {name: table.column(name).take(firsts).to_pylist() for name in ("path", "hash")}
    return Block(names["path"], names["hash"], views, **lists, rest=rest)


@dataclass(frozen=True)
class StoredTeacher:
    """All stored outputs of a folder, in memory.

    Args:
        folder: the folder.
        plan: its description.
        block: the outputs for all images, in order.
        classifier: (K, D) float16: the normalised rows of the teachers' last linear layers, side by side; None if a
            teacher has no such layer.
    """

    folder: Path
    plan: StoredPlan
    block: Block
    classifier: NDArray[np.float16] | None

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """The number of each image, by path."""
        return {path: number for number, path in enumerate(self.block.paths)}


def open_stored(folder: str | Path) -> StoredTeacher:
    """Read a folder of stored outputs.

    Raises:
        UserError: the folder is incomplete, damaged, or of another version.
    """
    plan, folder = read_stored_plan(folder), Path(folder)
    files = [folder / shard_name(number) for number in range(plan.num_shards)]
    if missing := [file for file in files if not exists(file)]:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(files)} shards, the first {missing[0].name}: type the line of "
            "mgd reinforce again to resume"
        )
    rows, label = plan.num_images * plan.samples, np.uint16 if plan.num_classes <= 1 << 16 else np.uint32
    block = Block(
        [],
        [],
        np.empty(rows, VIEW),
        np.empty((rows, plan.top), label),
        np.empty((rows, plan.top), np.float16),
        np.empty(rows, np.float16),
    )
    for number, file in enumerate(files):
        _append(block, read_block(file, plan, number))
    return StoredTeacher(folder, plan, block, _read_classifier(folder, plan))


def _append(total: Block, part: Block) -> None:
    """Copy a shard into the large arrays, after the shards before it: only one shard is in memory twice."""
    start = len(total.paths) * len(part.rest) // len(part.paths)
    for name in ("views", "classes", "log_probabilities", "rest"):
        getattr(total, name)[start : start + len(part.rest)] = getattr(part, name)
    total.paths.extend(part.paths)
    total.hashes.extend(part.hashes)


def _read_classifier(folder: Path, plan: StoredPlan) -> NDArray[np.float16] | None:
    path = folder / CLASSIFIER
    if not exists(path):
        return None
    try:
        classifier: NDArray[np.float16] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged: remove it, and type the line of mgd reinforce again") from error
    if classifier.ndim != 2 or len(classifier) != plan.num_classes:
        raise UserError(f"{path} has {classifier.shape} numbers: remove it, and type the line of mgd reinforce again")
    return classifier


class StoredViews:
    """The stored views of a run's images, with the teacher's outputs.

    In epoch e, an image is shown as sample e mod N. Its repetition r in the same epoch is sample (e + r) mod N.

    Args:
        stored: the teacher's outputs.
        names: the path of every image of the run, relative to the data folder that was stored.

    Raises:
        UserError: an image is not stored, or is mixed with one that the run does not have.
    """

    def __init__(self, stored: StoredTeacher, names: Sequence[str]) -> None:
        plan, stored_numbers = stored.plan, stored.numbers
        if missing := [name for name in names if name not in stored_numbers]:
            raise UserError(
                f"--teacher-cache {stored.folder} lacks {len(missing)} of {len(names)} training images, for example "
                f"{missing[0]}: store the teacher again with mgd reinforce, including these images"
            )
        self.plan, self.block, self.classifier = plan, stored.block, stored.classifier
        self.stored_number = np.array([stored_numbers[name] for name in names], dtype=np.int64)
        self.run_index = np.full(plan.num_images, -1, dtype=np.int64)  # stored number -> the run's index
        self.run_index[self.stored_number] = np.arange(len(names))
        if plan.views.mixes and (self.run_index < 0).any():
            first = stored.block.paths[int(np.argmin(self.run_index))]
            raise UserError(
                f"--teacher-cache {stored.folder} mixes images with {first}, which this run lacks: train on all images "
                "of the cache, or store the teacher without --mixup and --cutmix"
            )
        self._render = Renderer(plan.views)

    def part_of(self, positions: range) -> StoredViews:
        """Return the views of a part of the run's images, to measure the time of a step."""
        part = copy(self)
        part.stored_number = self.stored_number[positions]
        part.run_index = np.full_like(self.run_index, -1)
        part.run_index[part.stored_number] = np.arange(len(positions))
        return part

    def __call__(
        self, key: tuple[int, ...], decoded: Callable[[int], Tensor], samples: Sequence[Any]
    ) -> tuple[Any, ...]:
        """Return an item of the data set.

        Args:
            key: epoch and index of an image, and perhaps its repetition.
            decoded: index -> (3, height, width) bytes.
            samples: (path, class index) of every image.

        Returns:
            (S, S, 3) bytes, class index, index; class index of the partner, share of the image itself; of the teacher,
            classes (k,), their log-probabilities (k,), and the log of the total probability of the others.
        """
        rounds, epoch = divmod(key[0], REPEAT)
        index, sample = key[1], (epoch + rounds + sum(key[2:])) % self.plan.samples
        path, target = samples[index]
        row = int(self.stored_number[index]) * self.plan.samples + sample
        view = self.block.views[row]
        image, other = self._render(decoded(index), view, path), target
        number = int(view["partner"])
        partner = int(self.run_index[number])
        if number != self.stored_number[index] and partner >= 0:  # after `part_of`, some partners are missing
            partner_path, other = samples[partner]
            partner_view = self.block.views[number * self.plan.samples + sample]
            image = mix_views(image, self._render(decoded(partner), partner_view, partner_path), view)
        classes = torch.from_numpy(self.block.classes[row].astype(np.int64))
        values = torch.from_numpy(self.block.log_probabilities[row].astype(np.float32))
        outputs = (other, float(view["share"]), classes, values, float(self.block.rest[row]))
        return (image.permute(1, 2, 0).contiguous(), target, index, *outputs)
