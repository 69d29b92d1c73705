"""Open a classifier: a checkpoint, or a file that export.py wrote, which its own runtime runs."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from classification.data.preprocessing import Preprocessing, read_preprocessing
from classification.errors import UserError
from classification.models.exporting import DESCRIPTION, Compute, input_function_for, open_onnx, open_pt2
from classification.models.trained import open_trained
from classification.system.weight_files import is_onnx, is_program
from mgd import logits_of


@dataclass(frozen=True)
class Classifier:
    """A network that classifies images, independent of its runtime.

    Args:
        logits: bytes (B, img_size, img_size, 3) -> logits (B, K), float32, on the CPU.
        num_classes: K.
        classes: class names in order of index, or None if the file has none.
        preprocessing: of the images.
        note: what was loaded, in one line.
    """

    logits: Compute
    num_classes: int
    classes: list[str] | None
    preprocessing: Preprocessing
    note: str


def kind_of(path: Path) -> str | None:
    """Return "onnx" or "pt2" for an exported file, by its content; None for other files."""
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
        arch: name of its network, if the file does not say it.
        device: the network runs on it.

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
        UserError: the file is damaged, is of other code, or its runtime is missing.
    """
    if kind == "onnx" and find_spec("onnxruntime") is None:
        raise UserError(f"{path} needs onnxruntime: `pip install onnxruntime`, or the extra [export] of this project")
    try:
        compute, metadata = (open_pt2 if kind == "pt2" else open_onnx)(path)
    except Exception as error:  # a broken file may raise anything
        cause = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path} cannot be run ({cause}): export it again") from error
    arch, num_classes, classes, described = _read_description(path, metadata)
    preprocessing = read_preprocessing(described, Preprocessing(), str(path))
    prepare = input_function_for(preprocessing, takes_bytes=str(described.get("input")).startswith("uint8"))
    runtime = "torch.export" if kind == "pt2" else "onnxruntime"
    note = f"{path}: {arch}, run by {runtime} on the CPU"
    return Classifier(lambda pixels: compute(prepare(pixels)), num_classes, classes, preprocessing, note)


def _read_description(path: Path, metadata: Any) -> tuple[str, int, list[str] | None, dict[str, Any]]:
    """Return architecture, number of classes, their names, and preprocessing from an exported file's description."""
    if not set(DESCRIPTION) <= set(metadata):
        raise UserError(
            f"{path} does not say its classes and its preprocessing: mgd predict runs files that mgd export wrote"
        )
    try:
        arch, num_classes, classes, preprocessing = (json.loads(metadata[name]) for name in DESCRIPTION)
    except ValueError as error:
        raise UserError(f"{path} is damaged: its description is no JSON; export it again") from error
    is_list = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not isinstance(num_classes, int) or not isinstance(preprocessing, dict) or not (classes is None or is_list):
        raise UserError(f"{path} is damaged: its description makes no sense; export it again")
    return str(arch), num_classes, classes, preprocessing
