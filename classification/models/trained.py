"""A network from a checkpoint, with what the file says of it; for every command that uses a trained network."""

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

UNUSUAL = 1009  # classes that no layer's width equals


@dataclass(frozen=True)
class Trained:
    """A network with its weights, in eval mode.

    Args:
        path: the checkpoint.
        network: on the CPU.
        arch: its name here.
        num_classes: its number of outputs.
        classes: their names in order of index, or None where the file has none.
        preprocessing: what it sees of an image.
        note: what was loaded, in a line.
        int8: the scales that --int8-epochs learned: {call of the forward: (scale, zero point)}, or None.
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
        arch: its network, for a file that does not say it.

    Raises:
        UserError: a file that cannot be read, or does not say what it holds.
    """
    file = read_weights(path)
    name = arch or (known_name(file.arch) if file.arch else None)
    if name is None:
        said = f"says {file.arch!r}, which is no network here" if file.arch else "does not name its network"
        raise UserError(f"checkpoint {path} {said}: name it with --arch")
    number = file.num_classes or len(file.classes or ()) or _outputs(file, name)
    network = build(name, number, file.configuration)
    note = load_file(network, file, arch=name, num_classes=number, classes=file.classes)
    usual = None if "mean" in file.seen else usual_preprocessing(network, name)
    seen = file.preprocessing(usual or Preprocessing())
    return Trained(Path(path), network.eval(), name, number, file.classes, seen, note, file.int8)


def digest_of(networks: Sequence[Trained]) -> str:
    """Return 32 hexadecimal digits of all weights, and of what each network sees of an image."""
    state = blake2b(digest_size=16)
    for one in networks:
        state.update(f"{one.arch} {one.preprocessing}".encode())
        for name, value in sorted(one.network.state_dict().items()):
            state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def _outputs(file: WeightFile, arch: str) -> int:
    """Return the number of outputs of a file that does not say it: the rows of the weights that depend on it.

    These are found in a network of another number; without any, it is the rows of the last matrix. Strict loading
    then checks it.
    """
    state = next(iter(file.states.values()))
    heads = [
        name
        for name, value in build(arch, UNUSUAL, file.configuration).state_dict().items()
        if UNUSUAL in value.shape[:1]
    ]
    rows = [value.shape[0] for name, value in state.items() if any(f".{name}".endswith(f".{head}") for head in heads)]
    rows = rows or [value.shape[0] for value in state.values() if value.ndim >= 2]
    if not rows:
        raise UserError(f"checkpoint {file.path} holds no matrix of weights")
    return rows[-1]
