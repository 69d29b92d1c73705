"""Scores of images in Parquet shards: the format, the plan of a folder, and shards that processes share."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from classification.errors import UserError, quoted
from classification.paths import exists, is_file, is_folder
from classification.system.new_files import write_whole

FORMAT = 2
FORMATS = (1, FORMAT)  # formats that can be read; shards of format 1 have no energy
PLAN = "scores.json"
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("hash", pa.string()),
        ("path_hash", pa.uint64()),
        ("classes", pa.list_(pa.int32())),
        ("log_probabilities", pa.list_(pa.float32())),
        ("energy", pa.float32()),
    ]
)
READABLE_FORMATS = " and ".join(map(str, FORMATS))
ENERGY = "energy"  # this column may be missing
# The types that each column may have: other programs may write 64-bit offsets.
COLUMN_TYPES = {
    "path": (pa.string(), pa.large_string()),
    "hash": (pa.string(), pa.large_string()),
    "path_hash": (pa.uint64(),),
    "classes": (pa.list_(pa.int32()), pa.large_list(pa.int32())),
    "log_probabilities": (pa.list_(pa.float32()), pa.large_list(pa.float32())),
    ENERGY: (pa.float32(), None),
}


@dataclass(frozen=True)
class Plan:
    """The description of a folder of scores.

    Args:
        teacher: hash of the teachers' weights and preprocessing, in hexadecimal digits.
        num_classes: K.
        classes: class names in order of index, or None if the teachers do not have them.
        top: number of stored classes per image.
        num_images: number of images in all shards.
        images: hash of their paths in order.
        shard_size: number of images per shard; the last shard may have fewer.
        format: version of the files.
    """

    teacher: str
    num_classes: int
    classes: list[str] | None
    top: int
    num_images: int
    images: str
    shard_size: int
    format: int = FORMAT

    @property
    def num_shards(self) -> int:
        """The number of shards of the complete folder."""
        return -(-self.num_images // self.shard_size)


@dataclass(frozen=True)
class Row:
    """The scores of one image, as a row of a shard."""

    path: str
    hash: str
    path_hash: int
    classes: list[int]
    log_probabilities: list[float]
    energy: float


def path_hash(path: str) -> int:
    """Return a 64-bit hash of a path: the 8-byte BLAKE2b, big-endian, so it is the same on every machine."""
    return int.from_bytes(blake2b(os.fsencode(path), digest_size=8).digest(), "big")


def paths_digest(paths: Sequence[str]) -> str:
    """Return a hash of paths in their order."""
    state = blake2b(digest_size=16)
    for path in paths:
        state.update(os.fsencode(path) + b"\0")
    return state.hexdigest()


def shard_path(folder: Path, number: int) -> Path:
    """Return the file of shard `number`."""
    return folder / f"{number:06d}.parquet"


def begin_folder(folder: Path, plan: Plan) -> None:
    """Make the folder and write its plan, or check that an existing folder has the same plan.

    Raises:
        UserError: the folder contains other scores or other files, or cannot be written to.
    """
    if prepare_folder(folder, PLAN, "scores"):
        _check_plan(folder, read_plan(folder), plan)
        return
    write_whole(folder / PLAN, (json.dumps(asdict(plan), indent=1) + "\n").encode())
    _check_plan(folder, read_plan(folder), plan)  # another process may have written a plan at the same time


def prepare_folder(folder: Path, plan: str, content: str, other_names: tuple[str, ...] = ()) -> bool:
    """Make an output folder if it does not exist, and return whether it has a plan.

    Args:
        folder: of shards.
        plan: file name of the plan.
        content: of such a folder, for the message.
        other_names: names of other files that belong to such a folder.

    Raises:
        UserError: it is a file, has other files and no plan, or cannot be made.
    """
    if exists(folder) and not is_folder(folder):
        raise UserError(f"--output {folder} is a file: give a folder")
    # List the files before looking for the plan, because another process may write the plan in between.
    others = (
        [path for path in folder.iterdir() if not _is_own_file(path.name, (plan, *other_names))]
        if is_folder(folder)
        else []
    )
    if is_file(folder / plan):
        return True
    if others:
        raise UserError(f"--output {folder} contains other files than {content}: give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be made: {error.strerror}") from error
    return False


def _is_own_file(name: str, names: tuple[str, ...]) -> bool:
    """Return whether a file has one of these names, or is a shard, or a temporary file of one of them."""
    return any(own in name for own in names) or name.startswith(".") or name.endswith(".parquet")


def shard_order(num_shards: int, rank: int, size: int) -> list[int]:
    """Return the numbers of all shards, those of this rank first."""
    return sorted(range(num_shards), key=lambda shard: (shard % size != rank, shard))


def read_plan(folder: Path) -> Plan:
    """Read the plan of a folder of scores.

    Raises:
        UserError: there is no plan, or it is damaged or of another version.
    """
    try:
        content = json.loads((folder / PLAN).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no {PLAN}: give the --output of `mgd score`") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / PLAN} cannot be read: remove {folder} and score again") from error
    format_found = content.get("format") if isinstance(content, dict) else content
    if not isinstance(content, dict) or format_found not in FORMATS:
        raise UserError(
            f"{folder / PLAN} has format {quoted(format_found)}; this code reads formats {READABLE_FORMATS}: score "
            "again"
        )
    try:
        plan = Plan(**content)
        if any(number < 1 for number in (plan.num_classes, plan.top, plan.num_images, plan.shard_size)):
            raise TypeError("no number of classes, images or shards is below 1")
    except TypeError as error:
        raise UserError(f"{folder / PLAN} is damaged: remove {folder} and score again") from error
    return plan


def _check_plan(folder: Path, old: Plan, new: Plan) -> None:
    descriptions = {
        "teacher": "another teacher",
        "num_classes": "another number of classes",
        "classes": "other classes",
        "top": f"--top-p {old.top}",
        "num_images": f"{old.num_images} images, now {new.num_images}",
        "images": "other images, or in another order",
        "shard_size": f"--shard-size {old.shard_size}",
        "format": f"format {old.format}, now {new.format}",
    }
    differences = [text for name, text in descriptions.items() if getattr(old, name) != getattr(new, name)]
    if differences:
        raise UserError(
            f"{folder} was begun with {', '.join(differences[:2])}: type the same line to resume, or give another "
            "folder"
        )


@contextlib.contextmanager
def claim_shard(folder: Path, number: int) -> Iterator[BinaryIO | None]:
    """Open a temporary file for shard `number`; None if the shard exists, or another process works on it.

    The file is locked until the block or the process ends, so processes that share the folder never do the same shard.
    """
    part = folder / f".{number:06d}.part"
    if exists(shard_path(folder, number)):
        yield None
        return
    with part.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        # Another process may have finished the shard after the first check. Then our file is not needed.
        if exists(shard_path(folder, number)):
            with contextlib.suppress(FileNotFoundError):
                part.unlink()
            yield None
            return
        yield file


def finish_shard(file: BinaryIO, folder: Path, number: int, content: bytes) -> None:
    """Write a claimed shard and rename it; if the process is killed, the shard is complete or does not exist.

    Raises:
        UserError: the disk is full.
    """
    try:
        file.truncate(0)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        (folder / f".{number:06d}.part").replace(shard_path(folder, number))
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): make room, and type the same line to resume"
        ) from error


def encode_shard(rows: Sequence[Row], plan: Plan, unreadable: Mapping[str, str]) -> bytes:
    """Return the content of a shard's Parquet file; its metadata has the teacher, classes and unreadable images."""
    metadata = {
        "mgd.format": str(plan.format),
        "mgd.teacher": plan.teacher,
        "mgd.num_classes": str(plan.num_classes),
        "mgd.classes": json.dumps(plan.classes),
        "mgd.unreadable": json.dumps(dict(unreadable)),
    }
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    table = pa.table(columns, SCHEMA.with_metadata(metadata))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


@dataclass(frozen=True)
class Shards:
    """The checked shards of a folder.

    Args:
        files: the shards in order.
        teacher: hash of the teachers, the same in all shards; empty if they have none.
        num_classes: K, or None if the shards do not say it.
        classes: class names, or None.
        energy: whether the shards have the energy of each image.
    """

    files: list[Path]
    teacher: str
    num_classes: int | None
    classes: list[str] | None
    energy: bool = True


def open_shards(folder: Path) -> Shards:
    """Check and return the shards of a folder, which may be of another program and have no plan.

    Raises:
        UserError: there are no shards, one is missing, one has other columns, or they are of different teachers.
    """
    if not is_folder(folder):
        what = "is not a folder" if exists(folder) else "does not exist"
        raise UserError(f"{folder} {what}: give the --output of `mgd score`")
    files = sorted(path for path in folder.rglob("*.parquet") if not path.name.startswith("."))
    if exists(folder / PLAN):
        plan = read_plan(folder)
        expected = [shard_path(folder, number) for number in range(plan.num_shards)]
        if missing := sorted(set(expected) - set(files)):
            raise UserError(
                f"{folder} lacks {len(missing)} of {len(expected)} shards, for example {missing[0].name}: type the "
                "line of `mgd score` again to resume"
            )
        files = expected
    if not files:
        raise UserError(f"{folder} has no shards: expected *.parquet files from `mgd score`")
    metadata = {file: _metadata(file) for file in files}
    first = metadata[files[0]]
    for file, metadata_of_file in metadata.items():
        if (ENERGY in metadata_of_file) != (ENERGY in first):
            raise UserError(f"{file} and {files[0]} differ in the column {ENERGY}: score again, into a new folder")
        if metadata_of_file != first:
            raise UserError(
                f"{file} is from another teacher than {files[0]}: keep the scores of each in a folder of its own"
            )
    return Shards(
        files,
        first.get("mgd.teacher", ""),
        int(first["mgd.num_classes"]) if "mgd.num_classes" in first else None,
        json.loads(first.get("mgd.classes", "null")),
        ENERGY in first,
    )


def _metadata(file: Path) -> dict[str, Any]:
    """Check the columns of a shard; return the metadata that all shards of a folder must share."""
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} is not a Parquet file, or is damaged: remove it and score again") from error
    for name, types in COLUMN_TYPES.items():
        type_found = schema.field(name).type if name in schema.names else None
        if type_found not in types:
            got = str(type_found or "no such column")
            raise UserError(f"{file}: the column {name} must be {types[0]}; got {got}: score again, or convert it")
    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    if metadata.get("mgd.format", str(FORMAT)) not in map(str, FORMATS):
        raise UserError(
            f"{file} has format {metadata['mgd.format']}; this code reads formats {READABLE_FORMATS}: score again"
        )
    shared = {key: value for key, value in metadata.items() if key in ("mgd.teacher", "mgd.num_classes", "mgd.classes")}
    return {**shared, **({ENERGY: "there"} if ENERGY in schema.names else {})}
