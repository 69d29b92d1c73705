"""Run folders and checkpoints; a file is written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import os
import pickle
import platform
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # a system without such locks
    fcntl = None  # type: ignore[assignment]

import numpy as np
import torch
from torch import Tensor, nn

from classification.data.preprocessing import Preprocessing
from classification.data.samples import samples_digest
from classification.errors import UserError, one_line, quoted
from classification.options.config import recorded_options
from classification.options.options import Options, names_where
from classification.options.term_module import check_digest
from classification.paths import relative
from classification.runs.restore import check_complete, explain_damage
from classification.system.weight_files import FORMAT, read_checkpoint
from mgd.losses import LOSSES

VERSION = 3

save: Callable[[Any, Any], None] = torch.save

# Entries of a record that say where options come from; they are no options.
NOTED = frozenset({"command", "seeded", "img_size_asked"})
LOCK = ".lock"  # the first file of a run folder
IMAGES = "train_images.txt.gz"


def write_atomic(path: Path, content: Any) -> None:
    """Save `content` at `path`, completely or not at all.

    Raises:
        UserError: the disk is full, or the folder cannot be written to; an earlier file at `path` is unchanged.
    """
    _replace(path, lambda file: save(content, file))


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside `path`, force it to disk, and rename it to `path`."""
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            beside.unlink()
        os_error = error if isinstance(error, OSError) else error.__context__  # the file's own error inside torch's
        cause = os_error.strerror if isinstance(os_error, OSError) else str(error).splitlines()[0]
        note = "; the previous one is still there" if path.exists() else ""
        raise UserError(f"{path} cannot be written ({cause}): make room, or give another --output{note}") from error


def describe_student(
    state_dict: dict[str, Tensor],
    arch: str,
    num_classes: int,
    classes: list[str],
    preprocessing: Preprocessing,
    configuration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the plain content of `best.pth`: everything one needs to use the network elsewhere.

    Args:
        state_dict: the weights.
        arch: the network's name.
        num_classes: K.
        classes: names in order of index.
        preprocessing: of its images.
        configuration: further entries, as `models.configuration` returns them.
    """
    state = OrderedDict((name, value.detach().cpu()) for name, value in state_dict.items())
    if hasattr(state_dict, "_metadata"):  # the modules' versions: some networks cannot be loaded without them
        state._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return {
        "format": FORMAT,
        "state_dict": state,
        "arch": arch,
        "num_classes": num_classes,
        "classes": classes,
        **preprocessing.describe(),
        **(configuration or {}),
    }


@dataclass(frozen=True)
class Now:
    """This run, for comparison with the run that it resumes.

    Args:
        record: its options, as config.json records them.
        options: of the run.
        classes: names in order of index.
        inputs: see `fingerprints`.
        images: returns the training images as `image_names` does, to describe how they differ.
    """

    record: dict[str, Any]
    options: Options
    classes: list[str]
    inputs: dict[str, Any]
    images: Callable[[], Sequence[str]]


def read_resume(path: str, now: Now) -> tuple[dict[str, Any], list[str]]:
    """Read the `last.pth` of the run to resume; return it, and how that run differs from this one.

    Args:
        path: the file.
        now: this run.

    Raises:
        UserError: the file is not a last.pth, or is of another network or other classes; or something else that
            changes the result differs, and --resume-override is not given.
    """
    content = read_checkpoint(path)
    if not isinstance(content.get("resume"), dict):
        raise UserError(f"{path} holds only weights, so no run can be resumed from it: give a run folder")
    with explain_damage(path):
        return content, _compare(path, content, now)


def _compare(path: str, content: dict[str, Any], now: Now) -> list[str]:
    inputs, own = now.inputs, {**now.record, "classes": now.classes}
    resume = content["resume"]
    if resume.get("version") != VERSION:
        raise UserError(f"{path} has format {quoted(resume.get('version'))}; this code reads format {VERSION}")
    check_complete(path, content)
    for what in ("arch", "num_classes", "classes"):
        if content[what] != own[what]:
            raise UserError(f"{path} is from a run with {what} {content[what]}; this run has {own[what]}")
    terms_then = list(resume["terms"])
    if terms_then != inputs["terms"]:
        raise UserError(
            f"{path} is from a run with the terms {'+'.join(terms_then)}; this run has {'+'.join(inputs['terms'])}"
        )
    options_then = resume["config"]["options"]
    check_digest(now.options.terms.term_module, options_then.get("term_digest"), path)
    term_kinds = {**LOSSES, **{name: spec.kind for name, spec in now.options.table.items()}}
    options = changed_options(recorded_options(options_then, term_kinds), now.record)
    changed = [f"other options: {'; '.join(options)}"] if options else []
    if resume["inputs"]["teachers"] != inputs["teachers"] and not any(
        text.startswith("the teachers") for text in options
    ):
        changed.append("other weights of the teachers")
    # Checkpoints of earlier versions do not record the preprocessing.
    preprocessing_then = resume["inputs"].get("preprocessing", inputs["preprocessing"])
    changed += [
        f"a {role} that sees {preprocessing_then.get(role)}, now {preprocessing}"
        for role, preprocessing in inputs["preprocessing"].items()
        if preprocessing_then.get(role) != preprocessing
    ]
    if resume["inputs"]["training images"] != inputs["training images"]:
        changed.append(f"other training images: {_other_images(Path(path).parent / IMAGES, now.images())}")
    if changed and not now.options.run.resume_override:
        raise UserError(
            f"{path} is from a run with {', and '.join(changed)}. Use those of the run, or give --resume-override 1 "
            "to resume with the new ones"
        )
    return changed


def image_names(samples: Sequence[tuple[str, int]], root: str | Path) -> list[str]:
    """Return "path class" of every image, the path relative to the data folder."""
    return [f"{relative(path, root)} {target}" for path, target in samples]


def _other_images(path: Path, names: Sequence[str]) -> str:
    """Describe how a list of images differs from the one that a run saved."""
    try:
        with gzip.open(path, "rb") as file:
            then = set(os.fsdecode(file.read()).splitlines())
    except (OSError, EOFError, zlib.error):
        return f"which ones is unknown, because {path} cannot be read"
    now = {one_line(name) for name in names}
    then_files, now_files = ({line.rpartition(" ")[0] for line in lines} for lines in (then, now))
    parts = [
        f"{len(files)} {how}{_examples(files)}"
        for files, how in ((now_files - then_files, "more than then"), (then_files - now_files, "fewer than then"))
        if files
    ]
    moved = {line.rpartition(" ")[0] for line in now ^ then} & then_files & now_files
    parts += [f"{len(moved)} of another class{_examples(moved)}"] if moved else []
    return ", ".join(parts) or "the same ones, in another order"


def _examples(files: set[str]) -> str:
    names = sorted(files)
    return f" ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"


def keep_images(folder: Path, names: Sequence[str]) -> None:
    """Write the list of training images, so that a resumed run can say how its own list differs."""
    text = "".join(f"{one_line(name)}\n" for name in names).encode(errors="surrogateescape")
    _replace(folder / IMAGES, lambda file: file.write(gzip.compress(text, 1, mtime=0)))


def changed_options(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe the differences in options that change the result, each as "--lr 0.1, was 0.2"."""
    free = {*names_where("free"), *NOTED, *(() if now.get("seeded") else ("seed",))}
    decays = [entry.get("decay", "constant") for entry in now.get("terms", {}).values()]
    if now.get("lr_schedule") == "step" and set(decays) <= {"constant"} and not now.get("int8_epochs"):
        free.add("epochs")  # earlier epochs do not depend on their number
    if now.get("terms") == before.get("terms"):
        free.add("term")  # the same terms, typed in another way
    before, now = _flat(before), _flat(now)
    names = sorted((set(before) | set(now)) - free)
    return [
        f"{_option_name(name)} {_comparable(now, name)}, was {_comparable(before, name)}"
        for name in names
        if _comparable(before, name) != _comparable(now, name)
    ]


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options, with the options of terms under names like "mgd.reducer"."""
    flat = {name: value for name, value in options.items() if name != "terms"}
    return flat | {f"{name}.{key}": v for name, entry in options.get("terms", {}).items() for key, v in entry.items()}


def _option_name(name: str) -> str:
    return name if "." in name else f"the {name}" if name == "teachers" else f"--{name.replace('_', '-')}"


def _comparable(options: dict[str, Any], name: str) -> Any:
    """Return an option's value, without the paths of the teachers' files."""
    value = options.get(name)
    if name == "teachers":
        return [{key: v for key, v in teacher.items() if key != "resume"} for teacher in value or []]
    return value


def fingerprints(
    teachers: Iterable[nn.Module], samples: Sequence[tuple[str, int]], root: str | Path, terms: Iterable[str]
) -> dict[str, Any]:
    """Return what a run depends on beside its options: hashes of the teachers' weights and of the list of images."""
    weights = hashlib.sha256()
    for teacher in teachers:
        for value in teacher.state_dict().values():
            weights.update(_bytes(value))
    return {"teachers": weights.hexdigest(), "training images": samples_digest(samples, root), "terms": list(terms)}


def _bytes(value: Any) -> bytes:
    """Return an entry of a state dict as bytes: a tensor of any shape and type, or any other object."""
    if not isinstance(value, Tensor):
        return pickle.dumps(value)
    plain = value.detach().cpu().resolve_conj().resolve_neg().reshape(-1)  # `view` needs at least one axis
    return plain.contiguous().view(torch.uint8).numpy().tobytes()


def job_hash(record: Mapping[str, Any], inputs: dict[str, Any]) -> int:
    """Hash options and inputs (without the seed) to a 63-bit number, so that ranks can check they run the same job."""
    values = {name: _comparable(dict(record), name) for name in set(record) - names_where("free") - NOTED - {"seed"}}
    text = json.dumps([values, inputs], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def lock_folder(folder: Path) -> BinaryIO:
    """Make a run folder, and keep other processes from writing to it until the returned file is closed.

    The system releases the lock when this process ends, even if it is killed; forked processes do not share it. On a
    file system without locks, nothing is protected.

    Raises:
        UserError: another process has the lock, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+b")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    if fcntl is None:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return file
        with file:
            file.seek(0)
            holder = " ".join(file.read(200).decode(errors="replace").split())
        raise UserError(
            f"another process writes to {folder}{f' ({holder})' if holder else ''}: wait for its end, or stop it"
        ) from error
    with contextlib.suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        file.flush()
    return file


def make_folder(folder: Path, config: dict[str, Any], *, resumed: bool, bad: dict[str, str]) -> None:
    """Make the run folder, its config.json and bad_images.txt; a resumed run appends to the existing config.json."""
    path = folder / "config.json"
    try:
        (folder / "flow").mkdir(parents=True, exist_ok=True)
        if resumed and path.exists():
            before = json.loads(path.read_bytes())
            config = {**before, "resumed": [*before.get("resumed", []), config]}
        text = json.dumps(config, indent=2) + "\n"
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged: remove it, and the run resumes without the record of its beginning"
        ) from error
    _replace(path, lambda file: file.write(text.encode()))
    if bad:
        lines = b"".join(os.fsencode(f"{name}\t{why}\n") for name, why in bad.items())
        _replace(folder / "bad_images.txt", lambda file: file.write(lines))


def save_arrays(folder: Path, arrays: Mapping[str, Any], epoch: int) -> None:
    """Save the arrays of the terms' update before an epoch as the next file NNNN.npz.

    Arrays whose names begin with "cost" or "weights" are large, so they are removed from the earlier files. Files of
    this and later epochs, which a resumed run finds, are removed.
    """
    number = 0
    files = sorted(folder.glob("[0-9]*.npz"))
    for path in files:
        with np.load(path) as saved:
            if int(saved["epoch"]) >= epoch:
                break
            small = {name: saved[name] for name in saved if not name.startswith(("cost", "weights"))}
            is_small = len(small) == len(saved.files)
        if not is_small:
            _replace(path, partial(_write_arrays, small))
        number += 1
    _replace(folder / f"{number:04d}.npz", partial(_write_arrays, {"epoch": epoch, **arrays}))
    for path in files[number + 1 :]:
        path.unlink()


def _write_arrays(arrays: Mapping[str, Any], file: BinaryIO) -> None:
    np.savez_compressed(file, **arrays)
