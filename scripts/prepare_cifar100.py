"""Write CIFAR-100 as class folders: python scripts/prepare_cifar100.py ARCHIVE FOLDER

ARCHIVE is cifar-100-python.tar.gz or cifar-100-binary.tar.gz, as the data set's authors publish it, or the folder that
it was unpacked into; nothing is downloaded. FOLDER receives train/CLASS/NNNNN.png and valid/CLASS/NNNNN.png, numbered
in the order of the archive.
"""

from __future__ import annotations

import argparse
import io
import pickle
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PIXELS = 3 * 32 * 32
SPLITS = {"train": "train", "test": "valid"}
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
    found = {
        split: (np.asarray(content["data"], np.uint8).reshape(-1, 3, 32, 32), list(content["fine_labels"]))
        for split, content in zip(SPLITS.values(), splits, strict=True)
    }
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
    try:
        if archive.is_dir():
            files: dict[str, bytes] = {path.name: path.read_bytes() for path in archive.iterdir() if path.is_file()}
        else:
            with tarfile.open(archive) as tar:
                members = [(member.name, tar.extractfile(member)) for member in tar if member.isfile()]
                files = {Path(name).name: file.read() for name, file in members if file}
        names, found = (_binary if "train.bin" in files else _python)(files)
    except (OSError, tarfile.TarError, KeyError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{archive} is not cifar-100-python.tar.gz or cifar-100-binary.tar.gz: {error}") from error
    if any(
        len(images) != len(labels) or not set(labels) <= set(range(len(names))) for images, labels in found.values()
    ):
        raise ValueError(f"{archive} is damaged: its images and labels do not fit together")
    return names, found


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
    except ValueError as error:
        print(f"prepare_cifar100.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {number} images into {args.folder}")


if __name__ == "__main__":
    main()
