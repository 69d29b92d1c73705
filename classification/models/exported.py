"""A network that classifies, out of a checkpoint, or out of a file that export.py wrote, run by its own runtime."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from classification.data.preprocessing import Preprocessing, read
from classification.errors import UserError
from classification.models.exporting import DESCRIPTION, Compute, open_onnx, open_pt2, prepared
from classification.models.trained import open_trained
from classification.system.weight_files import is_onnx, is_program
from mgd import logits_of


@dataclass(frozen=True)
class Classifier:
    """A network that classifies images, whatever runs it.

    Args:
        logits: bytes (B, img_size, img_size, 3) to logits (B, K), float32, on the CPU.
        num_classes: K.
        classes: their names in order of index, or None where the file has none.
        preprocessing: what it sees of an image.
        note: what was loaded, in a line.
    """

    logits: Compute
    num_classes: int
    classes: list[str] | None
    preprocessing: Preprocessing
    note: str


def kind_of(path: Path) -> str | None:
    """Return "onnx" or "pt2" for an exported file, by its content; None for any other."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
        if start.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                return "pt2" if is_program(archive.namelist()) else None
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    return "onnx" if is_onnx(start) or path.suffix.lower() == ".onnx" else None


def open_checkpoint(path: Path, arch: str | None, device: torch.device) -> Classifier:
    """Open a checkpoint.

    Args:
        path: the file.
        arch: its network, for a file that does not say it.
        device: to run it on.

    Raises:
        UserError: as `open_trained`.
    """
    trained = open_trained(path, arch)
    network = trained.network.to(device)

    @torch.inference_mode()
    def logits(pixels: Tensor) -> Tensor:
        images = trained.preprocessing.normalise(pixels.to(device)).contiguous()
        return logits_of(network(images)).float().cpu()

    return Classifier(logits, trained.num_classes, trained.classes, trained.preprocessing, trained.note)


def open_exported(path: Path, kind: str) -> Classifier:
    """Open a file that export.py wrote.

    Args:
        path: the file.
        kind: "onnx" or "pt2".

    Raises:
        UserError: it is damaged or of other code, or its runtime is missing.
    """
    if kind == "onnx" and find_spec("onnxruntime") is None:
        raise UserError(f"{path} needs onnxruntime: `pip install onnxruntime`, or the extra [export] of this project")
    try:
        compute, said = (open_pt2 if kind == "pt2" else open_onnx)(path)
    except Exception as error:  # a broken file raises whatever its broken bytes happen to mean
        cause = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path} cannot be run ({cause}): export it again") from error
    number, names, seen = _described(path, said)
    known = read(seen, Preprocessing(), str(path))
    prepare = prepared(known, takes_bytes=str(seen.get("input")).startswith("uint8"))
    runtime = "torch.export" if kind == "pt2" else "onnxruntime"
    note = f"{path}: {json.loads(said['arch'])}, run by {runtime} on the CPU"
    return Classifier(lambda pixels: compute(prepare(pixels)), number, names, known, note)


def _described(path: Path, said: Any) -> tuple[int, list[str] | None, dict[str, Any]]:
    """Return number of classes, their names, and the preprocessing that an exported file describes."""
    if not set(DESCRIPTION) <= set(said):
        raise UserError(
            f"{path} does not say its classes and its preprocessing: mgd predict runs files that mgd export wrote"
        )
    try:
        number, names, seen = (json.loads(said[name]) for name in DESCRIPTION[1:])
    except ValueError as error:
        raise UserError(f"{path} is damaged: its description is no JSON; export it again") from error
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not isinstance(number, int) or not isinstance(seen, dict) or not (names is None or listed):
        raise UserError(f"{path} is damaged: its description makes no sense; export it again")
    return number, names, seen
