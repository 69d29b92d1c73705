"""Write CIFAR-100 as class folders: python scripts/prepare_cifar100.py ARCHIVE FOLDER

ARCHIVE is cifar-100-python.tar.gz or cifar-100-binary.tar.gz, as the data set's authors publish it, or the folder that
it was unpacked into; nothing is downloaded. FOLDER receives train/CLASS/NNNNN.png and valid/CLASS/NNNNN.png, numbered
in the order of the archive.
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PIXELS = 3 * 32 * 32
SPLITS = {"train": "train", "test": "valid"}
PYTHON, BINARY = ("meta", "train", "test"), ("train.bin", "test.bin", "fine_label_names.txt")
NUMBER = 60_000  # images of the whole data set
Split = tuple[np.ndarray, list[int]]  # (N, 3, 32, 32) bytes, and classes
ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),  # of bytes that Python 3 has saved
}


class _Arrays(pickle.Unpickler):
    """Read arrays and plain values: a pickle of anything else would run its own code."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # its name before NumPy 2
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no array")


def _python(files: dict[str, bytes]) -> tuple[list[str], dict[str, Split]]:
    meta, *splits = (_Arrays(io.BytesIO(files[name]), encoding="latin1").load() for name in ("meta", *SPLITS))
    found = {}
    for split, content in zip(SPLITS.values(), splits, strict=True):
        data = np.asarray(content["data"])
        if data.dtype != np.uint8:
            raise ValueError(f"its pixels must be bytes, not {data.dtype}")
        found[split] = data.reshape(-1, 3, 32, 32), list(content["fine_labels"])
    return list(meta["fine_label_names"]), found


def _binary(files: dict[str, bytes]) -> tuple[list[str], dict[str, Split]]:
    names = files["fine_label_names.txt"].decode().split()
    found = {}
    for name, split in SPLITS.items():
        rows = np.frombuffer(files[f"{name}.bin"], np.uint8).reshape(-1, 2 + PIXELS)  # two labels in front
        found[split] = rows[:, 2:].reshape(-1, 3, 32, 32), rows[:, 1].tolist()
    return names, found


def read(archive: Path) -> tuple[list[str], dict[str, Split]]:
    """Return the class names, and the images and classes of train and valid.

    Raises:
        ValueError: a file that is no archive, or one that holds something else.
    """
    if not archive.exists():
        raise ValueError(f"{archive} does not exist")
    try:
        files = _folder(archive) if archive.is_dir() else _archive(archive)
        wanted = BINARY if BINARY[0] in files else PYTHON
        if missing := [name for name in wanted if name not in files]:
            raise ValueError(f"it holds no file {missing[0]}")
        names, found = (_binary if wanted is BINARY else _python)(files)
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
        raise ValueError(f"{archive} is not cifar-100-python.tar.gz or cifar-100-binary.tar.gz: {reason}") from error
    _check(archive, names, found)
    return names, found


def _folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _archive(archive: Path) -> dict[str, bytes]:
    try:
        with tarfile.open(archive) as tar:
            members = [(member.name, tar.extractfile(member)) for member in tar if member.isfile()]
            files = {Path(name).name: file.read() for name, file in members if file}
            while tar.fileobj is not None and tar.fileobj.read(2**20):  # its end holds the checksum
                pass
    except zlib.error as error:
        raise ValueError(f"it is damaged: {error}") from error
    return files


def _check(archive: Path, names: list[str], found: dict[str, Split]) -> None:
    """Refuse names that are no folders of their own, and labels that are no classes of the images."""
    plain = [name for name in names if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name)]
    if len(set(plain)) < len(names):
        raise ValueError(f"{archive} is damaged: its classes need names of their own, of letters and digits")
    for images, labels in found.values():
        whole = all(isinstance(label, int | np.integer) and 0 <= label < len(names) for label in labels)
        if not whole or len(images) != len(labels) or not labels:
            raise ValueError(f"{archive} is damaged: its images and labels do not fit together")


def _written(names: list[str], found: dict[str, Split], folder: Path) -> Iterator[Path]:
    for split, (images, labels) in found.items():
        for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / split / names[label] / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
            yield path


def prepare(archive: Path, folder: Path) -> int:
    """Write the images; `folder` appears when it is complete. Return how many they are.

    Raises:
        ValueError: `folder` is there already, or what `read` raises.
        OSError: it cannot be written.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already: name a new folder")
    names, found = read(archive)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        number = sum(1 for _ in _written(names, found, Path(beside, "whole")))
        Path(beside, "whole").rename(folder)
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    try:
        number = prepare(args.archive, args.folder)
    except (ValueError, OSError) as error:
        print(f"prepare_cifar100.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {number} images into {args.folder}")
    if number != NUMBER:
        print(f"prepare_cifar100.py: the whole of CIFAR-100 has {NUMBER} images", file=sys.stderr)


if __name__ == "__main__":
    main()
