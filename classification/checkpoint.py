"""Run folders and checkpoints: written whole or not at all."""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classification.data import MEAN, STD
from classification.errors import UserError
from classification.models.weights import read_checkpoint
from mgd import Flow

VERSION = 1


def write_atomic(path: Path, content: Any) -> None:
    """Save `content` beside `path`, force it to disk, and rename it over `path`."""
    beside = path.with_name(path.name + ".new")
    with beside.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def describe_student(state_dict: dict[str, Tensor], args: Namespace, classes: list[str]) -> dict[str, Any]:
    """Return the plain content of `best.pth`: everything one needs to use the network elsewhere."""
    return {
        "state_dict": {name: value.detach().cpu() for name, value in state_dict.items()},
        "arch": args.arch,
        "num_classes": args.num_classes,
        "classes": classes,
        "mean": list(MEAN),
        "std": list(STD),
        "img_size": args.img_size,
    }


def read_resume(path: str, args: Namespace, classes: list[str]) -> dict[str, Any]:
    """Read the `last.pth` of a run that this one is to go on with.

    Raises:
        UserError: not such a file, or of another network or other classes.
    """
    content = read_checkpoint(path)
    if "resume" not in content:
        raise UserError(f"{path} holds weights only and cannot be gone on with: give the last.pth of a run folder")
    if content["resume"].get("version") != VERSION:
        raise UserError(f"{path} has format {content['resume'].get('version')}; this code reads format {VERSION}")
    for what, ours in (("arch", args.arch), ("num_classes", args.num_classes), ("classes", classes)):
        if content[what] != ours:
            raise UserError(f"{path} is of a run with {what} {content[what]}; this run has {ours}")
    theirs = list(content["resume"]["terms"])
    if theirs != list(args.terms):
        raise UserError(f"{path} is of a run with the terms {'+'.join(theirs)}; this run has {'+'.join(args.terms)}")
    return content


def run_folder(args: Namespace, name: str) -> Path:
    """Return the folder that this run writes to; one named by --output is made, to see whether it can be.

    Raises:
        UserError: it holds something already, is a file, or cannot be made.
    """
    if args.resume:
        return Path(args.resume).resolve().parent
    if not args.output:
        return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = Path(args.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"--output {folder} exists already and is not overwritten: give another, or --resume its last.pth"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be made: {error.strerror}") from error
    return folder


def make_folder(folder: Path, config: dict[str, Any]) -> None:
    """Make the run folder and its config.json; a resumed run keeps the one it has."""
    try:
        (folder / "flow").mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").exists():
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}") from error


def save_flows(folder: Path, number: int, flows: list[Flow], costs: list[Tensor], epoch: int) -> None:
    """Save update `number`: index, shape, total and matrix of costs of every stage.

    Cost matrices are large and kept of the last update only: the one before loses them.
    """
    path, before = (folder / f"{n:04d}.npz" for n in (number, number - 1))
    if before.exists():
        with np.load(before) as saved:
            kept = {name: saved[name] for name in saved if not name.startswith("cost")}
        np.savez_compressed(before, **kept)
    arrays: dict[str, Any] = {"epoch": epoch}
    for stage, (flow, cost) in enumerate(zip(flows, costs, strict=True)):
        arrays[f"cost{stage}"] = cost.cpu().numpy().astype(np.float32)
        arrays[f"index{stage}"] = flow.index
        arrays[f"num_teacher{stage}"] = flow.num_teacher
        arrays[f"total_cost{stage}"] = flow.total_cost
    np.savez_compressed(path, **arrays)
