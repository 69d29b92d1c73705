"""Open a trained network from a checkpoint, with its classes and preprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from torch import nn

from classification.data.preprocessing import Preprocessing
from classification.errors import UserError
from classification.models import build, known_name
from classification.models.pretrained import usual_preprocessing
from classification.models.weights import WeightFile, load_file, read_weights

UNUSUAL_NUM_CLASSES = 1009  # a number of classes that is not the width of any layer


@dataclass(frozen=True)
class Trained:
    """A network with its weights, in eval mode.

    Args:
        path: the checkpoint.
        network: on the CPU.
        arch: its name here.
        num_classes: its number of outputs.
        classes: class names in order of index, or None if the file has none.
        preprocessing: of its images.
        note: what was loaded, in one line.
        int8: scales learned by --int8-epochs, {call of the forward: (scale, zero point)}, or None.
    """

    path: Path
    network: nn.Module
    arch: str
    num_classes: int
    classes: list[str] | None
    preprocessing: Preprocessing
    note: str
    int8: dict[str, tuple[float, int]] | None = None


def open_trained(path: str | Path, arch: str | None = None) -> Trained:
    """Build the network of a checkpoint and load it: a best.pth, or weights as other code saves them.

    Args:
        path: the file.
        arch: name of its network, if the file does not say it.

    Raises:
        UserError: the file cannot be read, or its network is not known.
    """
    file = read_weights(path)
    name = arch or (known_name(file.arch) if file.arch else None)
    if name is None:
        problem = f"says {file.arch!r}, which is no network here" if file.arch else "does not name its network"
        raise UserError(f"checkpoint {path} {problem}: name it with --arch")
    num_outputs = file.num_classes or len(file.classes or ()) or _find_num_outputs(file, name)
    network = build(name, num_outputs, file.configuration)
    note = load_file(network, file, arch=name, num_classes=num_outputs, classes=file.classes)
    default = None if "mean" in file.preprocessing_values else usual_preprocessing(network, name)
    preprocessing = file.preprocessing(default or Preprocessing())
    return Trained(Path(path), network.eval(), name, num_outputs, file.classes, preprocessing, note, file.int8)


def networks_digest(networks: Sequence[Trained]) -> str:
    """Return a hash of the networks' names, preprocessing and weights: 32 hexadecimal digits."""
    state = blake2b(digest_size=16)
    for trained in networks:
        state.update(f"{trained.arch} {trained.preprocessing}".encode())
        for name, value in sorted(trained.network.state_dict().items()):
            state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def _find_num_outputs(file: WeightFile, arch: str) -> int:
    """Find the number of outputs of a file that does not say it, from the shapes of its weights.

    The network is built with an unusual number of classes, to see which weights depend on it. If the file has none of
    these, the rows of its last matrix are counted. Loading is strict, so a wrong number is noticed.
    """
    state = next(iter(file.states.values()))
    heads = [
        name
        for name, value in build(arch, UNUSUAL_NUM_CLASSES, file.configuration).state_dict().items()
        if UNUSUAL_NUM_CLASSES in value.shape[:1]
    ]
    rows = [value.shape[0] for name, value in state.items() if any(f".{name}".endswith(f".{head}") for head in heads)]
    rows = rows or [value.shape[0] for value in state.values() if value.ndim >= 2]
    if not rows:
        raise UserError(
            f"checkpoint {file.path} has no weight matrix, so its number of classes is unknown: give the weights of a "
            "classifier"
        )
    return rows[-1]
