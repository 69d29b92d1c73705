"""Scores of images as Parquet files: their columns, the shards of a folder, and the plan that a resumed run keeps."""

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
FORMATS = (1, FORMAT)  # that are read; shards of format 1 have no energy
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
KNOWN = " and ".join(map(str, FORMATS))
ENERGY = "energy"  # the column that shards may lack
# Other writers may use 64-bit offsets; the engine reads both.
ALIKE = {
    "path": (pa.string(), pa.large_string()),
    "hash": (pa.string(), pa.large_string()),
    "path_hash": (pa.uint64(),),
    "classes": (pa.list_(pa.int32()), pa.large_list(pa.int32())),
    "log_probabilities": (pa.list_(pa.float32()), pa.large_list(pa.float32())),
    ENERGY: (pa.float32(), None),
}


@dataclass(frozen=True)
class Plan:
    """What a folder of scores holds.

    Args:
        teacher: digest of the teachers' weights and of what they see, in hexadecimal digits.
        num_classes: K.
        classes: their names in order of index, or None where the teachers do not say them.
        top: classes per image.
        num_images: images over all shards.
        images: digest of their paths in order.
        shard_size: images per shard; the last one may have fewer.
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
        """How many shards there will be."""
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
    """Return 64 bits that stand for a path, the same on every machine: the first bytes of BLAKE2b, big end first."""
    return int.from_bytes(blake2b(os.fsencode(path), digest_size=8).digest(), "big")


def paths_digest(paths: Sequence[str]) -> str:
    """Return a digest of paths in their order."""
    state = blake2b(digest_size=16)
    for path in paths:
        state.update(os.fsencode(path) + b"\0")
    return state.hexdigest()


def shard_path(folder: Path, number: int) -> Path:
    """Return the file of shard `number`."""
    return folder / f"{number:06d}.parquet"


def begin(folder: Path, plan: Plan) -> None:
    """Make the folder and write its plan, or check that it was begun with the same one.

    Raises:
        UserError: the folder holds other scores, or something else, or cannot be written to.
    """
    if has_plan(folder, PLAN, "scores"):
        _compare(folder, read_plan(folder), plan)
        return
    write_whole(folder / PLAN, (json.dumps(asdict(plan), indent=1) + "\n").encode())
    _compare(folder, read_plan(folder), plan)  # a rank that came first may have written another


def has_plan(folder: Path, plan: str, what: str, beside: tuple[str, ...] = ()) -> bool:
    """Make an output folder where there is none, and return whether its plan is there.

    Args:
        folder: of shards.
        plan: file name of the plan.
        what: the folder holds, for the message.
        beside: names of files that belong to it, too.

    Raises:
        UserError: it is a file, holds other files and no plan, or cannot be made.
    """
    if exists(folder) and not is_folder(folder):
        raise UserError(f"--output {folder} is a file: give a folder")
    # The names first: another rank may write the plan between the two looks.
    others = [path for path in folder.iterdir() if not _is_own(path.name, (plan, *beside))] if is_folder(folder) else []
    if is_file(folder / plan):
        return True
    if others:
        raise UserError(f"--output {folder} contains other files than {what}: give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be made: {error.strerror}") from error
    return False


def _is_own(name: str, names: tuple[str, ...]) -> bool:
    """Whether a file is one of these or a shard, complete or being written."""
    return any(own in name for own in names) or name.startswith(".") or name.endswith(".parquet")


def shard_order(number: int, rank: int, size: int) -> list[int]:
    """Return all of `number` shards, those of this rank first; the others are taken where nobody works on them."""
    return sorted(range(number), key=lambda shard: (shard % size != rank, shard))


def read_plan(folder: Path) -> Plan:
    """Read the plan of a folder of scores.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    try:
        content = json.loads((folder / PLAN).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no {PLAN}: give the --output of `mgd score`") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / PLAN} cannot be read: remove {folder} and score again") from error
    found = content.get("format") if isinstance(content, dict) else content
    if not isinstance(content, dict) or found not in FORMATS:
        raise UserError(f"{folder / PLAN} has format {quoted(found)}; this code reads formats {KNOWN}: score again")
    try:
        return Plan(**content)
    except TypeError as error:
        raise UserError(f"{folder / PLAN} is damaged: remove {folder} and score again") from error


def _compare(folder: Path, then: Plan, now: Plan) -> None:
    words = {
        "teacher": "another teacher",
        "num_classes": "another number of classes",
        "classes": "other classes",
        "top": f"--top-p {then.top}",
        "num_images": f"{then.num_images} images, now {now.num_images}",
        "images": "other images, or in another order",
        "shard_size": f"--shard-size {then.shard_size}",
        "format": f"format {then.format}, now {now.format}",
    }
    different = [text for name, text in words.items() if getattr(then, name) != getattr(now, name)]
    if different:
        raise UserError(
            f"{folder} was begun with {', '.join(different[:2])}: type the same line to resume, or give another folder"
        )


@contextlib.contextmanager
def claimed(folder: Path, number: int) -> Iterator[BinaryIO | None]:
    """Open shard `number` for writing, under another name until `finish`; None where it is done or another's.

    The file is locked: processes that share the folder never do the same shard, and a lock ends with its process.
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
        # Another process may have finished the shard after the first look. What we opened is then its file, or a new
        # one without use.
        if exists(shard_path(folder, number)):
            with contextlib.suppress(FileNotFoundError):
                part.unlink()
            yield None
            return
        yield file


def finish(file: BinaryIO, folder: Path, number: int, content: bytes) -> None:
    """Write a claimed shard to disk and give it its name; a kill leaves it complete or absent.

    Raises:
        UserError: the disk is full.
    """
    try:
        file.truncate(0)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        (folder / f".{number:06d}.part").replace(shard_path(folder, number))
        place = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): make room, and type the same line to resume"
        ) from error


def encode(rows: Sequence[Row], plan: Plan, unreadable: Mapping[str, str]) -> bytes:
    """Return a shard: the rows, and in the metadata of its schema the teacher, classes and unreadable images."""
    about = {
        "mgd.format": str(plan.format),
        "mgd.teacher": plan.teacher,
        "mgd.num_classes": str(plan.num_classes),
        "mgd.classes": json.dumps(plan.classes),
        "mgd.unreadable": json.dumps(dict(unreadable)),
    }
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    table = pa.table(columns, SCHEMA.with_metadata(about))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


@dataclass(frozen=True)
class Shards:
    """The scores of a folder, checked.

    Args:
        files: the shards in order.
        teacher: digest that all of them name, or an empty string where they name none.
        num_classes: K, or None where they do not say it.
        classes: their names, or None.
        energy: whether they hold the energy of each image.
    """

    files: list[Path]
    teacher: str
    num_classes: int | None
    classes: list[str] | None
    energy: bool = True


def open_shards(folder: Path) -> Shards:
    """Return the shards of a folder; those of another program, without a plan, need the same columns.

    Raises:
        UserError: no shard, a missing one, one with other columns, or two teachers.
    """
    if not is_folder(folder):
        what = "is not a folder" if exists(folder) else "does not exist"
        raise UserError(f"{folder} {what}: give the --output of `mgd score`")
    files = sorted(path for path in folder.rglob("*.parquet") if not path.name.startswith("."))
    if exists(folder / PLAN):
        plan = read_plan(folder)
        wanted = [shard_path(folder, number) for number in range(plan.num_shards)]
        if missing := sorted(set(wanted) - set(files)):
            raise UserError(
                f"{folder} lacks {len(missing)} of {len(wanted)} shards, for example {missing[0].name}: type the line "
                "of `mgd score` again to resume"
            )
        files = wanted
    if not files:
        raise UserError(f"{folder} has no shards: expected *.parquet files from `mgd score`")
    metadata = {file: _metadata(file) for file in files}
    first = metadata[files[0]]
    for file, found in metadata.items():
        if (ENERGY in found) != (ENERGY in first):
            raise UserError(f"{file} and {files[0]} differ in the column {ENERGY}: score again, into a new folder")
        if found != first:
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
    """Return what a shard says of its teacher, its columns checked."""
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} is not a Parquet file, or is damaged: remove it and score again") from error
    for name, kinds in ALIKE.items():
        found = schema.field(name).type if name in schema.names else None
        if found not in kinds:
            got = str(found or "no such column")
            raise UserError(f"{file}: the column {name} must be {kinds[0]}; got {got}: score again, or convert it")
    about = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    if about.get("mgd.format", str(FORMAT)) not in map(str, FORMATS):
        raise UserError(f"{file} has format {about['mgd.format']}; this code reads formats {KNOWN}: score again")
    kept = {key: value for key, value in about.items() if key in ("mgd.teacher", "mgd.num_classes", "mgd.classes")}
    return {**kept, **({ENERGY: "there"} if ENERGY in schema.names else {})}
