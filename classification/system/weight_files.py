"""Read checkpoint files as plain values, without running code in them, or say why that fails and what to do."""

from __future__ import annotations

import argparse
import codecs
import collections
import datetime
import json
import pathlib
import re
import types
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file as load_safetensors
from torch import Tensor

from classification.errors import UserError, quoted
from classification.paths import exists, is_file, is_folder

USUAL = ("best.pth", "last.pth", "model.safetensors", "pytorch_model.bin")  # names of weights in folders
FORMAT = 4  # of our checkpoints; those before 4 describe no resize, crop and interpolation


def _plain(*_: Any) -> dict[Any, Any]:
    """Make the dictionary that a `defaultdict` is filled into."""
    return {}


def _row(*_: Any) -> list[Any]:
    """Make the list that a `deque` is filled into."""
    return []


_MULTIARRAY = "numpy._core.multiarray", "numpy.core.multiarray"  # of numpy 2 and 1
# Dictionaries by another name, in which others keep options.
CONFIGS = ("yacs.config.CfgNode", "fvcore.common.config.CfgNode", "easydict.EasyDict", "addict.addict.Dict")
# What others keep beside weights: plain values, which do nothing when they are made.
HARMLESS: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    frozenset,
    datetime.datetime,
    datetime.date,
    datetime.timedelta,
    torch.torch_version.TorchVersion,
    np.ndarray,
    np.dtype,
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
    *((np._core.multiarray.scalar, f"{module}.scalar") for module in _MULTIARRAY),  # type: ignore[attr-defined]
    *((np._core.multiarray._reconstruct, f"{module}._reconstruct") for module in _MULTIARRAY),  # type: ignore[attr-defined]
    (codecs.encode, "_codecs.encode"),
    (_plain, "collections.defaultdict"),
    (_row, "collections.deque"),
    *((collections.OrderedDict, name) for name in CONFIGS),
    *((getattr(pathlib, f"Pure{kind}Path"), f"{module}.{pure}{kind}Path")  # pure: they need no such system
      for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows") for pure in ("", "Pure")),
    *((kind, f"builtins.{kind.__name__}") for kind in (list, dict, int, float, str, bool)),
]  # fmt: skip


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file written by torch.save that holds tensors and plain values only, or a safetensors file.

    Raises:
        UserError: missing, not a file, broken, holding code, or of a later format; it says what to do.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError(f"checkpoint {path} {_no_file(path)}")
    try:
        content = load(path)
    except Exception as error:  # broken files raise whatever their broken bytes happen to mean
        raise UserError(f"checkpoint {path} cannot be read: {cause(path, error)}") from error
    if not isinstance(content, Mapping):
        raise UserError(
            f"checkpoint {path} holds a {type(content).__name__}, not a dictionary of weights: save the network's "
            "state_dict() instead"
        )
    number = content.get("format")
    if "arch" in content and type(number) is int and number > FORMAT:
        raise UserError(
            f"checkpoint {path} was written by a newer version of this code, in format {number}; this one reads "
            f"formats up to {FORMAT}: use the newer version"
        )
    return content  # type: ignore[return-value]


def damaged_error(path: str, why: str) -> UserError:
    """Return the error for a checkpoint that is not ours, or is damaged."""
    return UserError(f"{path} is damaged, or was not written by this code ({why}): resume from another file")


def _no_file(path: Path) -> str:
    """Say what stands where a file was expected."""
    if not exists(path):
        return "does not exist"
    if not is_folder(path):
        return "is not a file"
    names = [name for name in USUAL if is_file(path / name)]
    file = f"a file in it, for example {path / names[0]}" if names else "a file of weights, or the folder of a run"
    return f"is a folder: give {file}"


def load(path: Path) -> Any:
    """Return the content of a file, whatever its suffix, on the CPU; no code in it is run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a broken file looks like
        if _is_safetensors(path):
            return _with_description(path, load_safetensors(path))
        with torch.serialization.safe_globals(HARMLESS), path.open("rb") as file:  # a path would be read by its suffix
            return torch.load(file, map_location="cpu", weights_only=True)


def _with_description(path: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the weights of a safetensors file; one that export.py wrote says in its metadata what they are."""
    with safe_open(path, "pt") as file:
        said = file.metadata() or {}
    if not {"arch", "num_classes", "classes", "preprocessing"} <= set(said):
        return dict(state)
    keys = ("arch", "num_classes", "classes", "configuration")  # the last of Hugging Face alone
    about = {name: json.loads(said[name]) for name in keys if name in said}
    return {"format": FORMAT, "state_dict": state, **about, **json.loads(said["preprocessing"])}


def _is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors do: the length of its head, and a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and 2 <= length <= 100_000_000


_AGAIN = "copy or download it again"
# How files of other kinds begin, what they are, and what to do.
KINDS: list[tuple[bytes, str]] = [
    (b"version https://git-lfs", "it is a Git LFS pointer, not the file itself: run `git lfs pull` where it came from"),
    (b"\x1f\x8b", "it is packed by gzip: unpack it first"),
    (b"BZh", "it is packed by bzip2: unpack it first"),
    (b"\xfd7zXZ", "it is packed by xz: unpack it first"),
    (b"7z\xbc\xaf", "it is a 7z archive: unpack it first"),
    (b"\x89HDF", "it is an HDF5 file, as Keras writes: convert its weights to PyTorch first"),
    (b"\x93NUMPY", "it is a NumPy array: save a state_dict() by torch.save"),
]
SUFFIXES = {
    ".onnx": "it is an ONNX file: give the PyTorch weights that it was exported from",
    ".pb": "it is a TensorFlow file: convert its weights to PyTorch first",
    ".tflite": "it is a TensorFlow Lite file: convert its weights to PyTorch first",
    ".index": "it is a TensorFlow file: convert its weights to PyTorch first",
}


def cause(path: Path, error: Exception) -> str:
    """Say in a few words why a file could not be read, and what to do."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as closed:
        return f"{closed.strerror}"
    if not start:
        return f"it is empty: {_AGAIN}"
    if not start.strip(b"\0"):
        return f"it begins with zeros, perhaps because its writing was interrupted: {_AGAIN}"
    for head, said in KINDS:
        if start.startswith(head):
            return said
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        return "it is a web page, not the file itself: download it from the address that the page links to"
    if start[257:262] == b"ustar":
        return "it is a tar archive: unpack it first"
    if start.startswith(b"PK"):
        return _zip_cause(path, error)
    if by_name := SUFFIXES.get(path.suffix.lower()):
        return by_name
    if is_onnx(start):
        return SUFFIXES[".onnx"]
    if _is_safetensors(path):
        return f"it is a safetensors file that is truncated or damaged: {_AGAIN}"
    if start.startswith(b"\x80"):
        return _code(error) or f"it is truncated, or a pickle of another format: {_AGAIN}, or save a state_dict()"
    if b'"weight_map"' in start:
        return "it lists weights in several files: join those into one state_dict() first"
    if text.isascii() and b"\0" not in text:
        return f"it is a text file: {_AGAIN}"
    return "it is truncated, or of another format than torch.save and safetensors write"


def is_onnx(start: bytes) -> bool:
    """Return whether a file begins as ONNX files do: a version, then the name of what wrote it."""
    return start[:1] == b"\x08" and (b"onnx" in start.lower() or b"pytorch" in start)


def is_program(names: Iterable[str]) -> bool:
    """Return whether an archive that holds these files is a program of torch.export."""
    inside = {name.partition("/")[2] for name in names}
    return "archive_format" in inside or any(name.startswith("models/") for name in inside)


def _zip_cause(path: Path, error: Exception) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, NotImplementedError):
        return f"it is truncated or damaged: {_AGAIN}"
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside:
        return (
            "it is a TorchScript archive, which contains code: if you trust it, load it with torch.jit.load, and save "
            "its state_dict()"
        )
    if is_program(names):
        return (
            "it is a program of torch.export: if you trust it, load it with torch.export.load, and save its state_dict"
        )
    if all(name.endswith(".npy") for name in names):
        return "it holds NumPy arrays: save a state_dict() by torch.save"
    if "data.pkl" not in inside:
        return "it is a zip archive: unpack it first"
    if broken is not None:
        return f"it is damaged (in {broken}): {_AGAIN}"
    return _code(error) or f"it is damaged: {_AGAIN}"


def _code(error: Exception) -> str | None:
    """Name what a pickle holds beside tensors and plain values, by the words of torch's own reader."""
    text = str(error)
    found = re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"<(?:class|function) '?([\w.]+)", text)
    if found is None and "weights_only" not in text and "WeightsUnpickler" not in text:
        return None
    what = quoted(found[1])[1:-1] if found else "more than tensors and plain values"
    return (
        f"it contains {what}: a pickled network or other code, which is never run; if you trust the file, load it "
        "with the code that made it, and save the network's state_dict()"
    )
