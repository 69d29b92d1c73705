"""Run folders written by hand, as a training leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from classification.data.preprocessing import Preprocessing
from classification.models import build
from classification.runs.checkpoint import describe_student
from tests.classification.conftest import STUDENT, TEACHER, picture

CLASSES = ["<script>document.title = 'hit'", "b & c"]
CLOSING = "</script><img src=x onerror=\"document.title='hit'\">"


def write_images(root: Path, num: int = 4) -> Path:
    """Write a data folder of two classes, one of a name that is code."""
    rng = np.random.default_rng(0)
    for split in ("train", "valid"):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(num):
                picture(label, rng).save(root / split / name / f"{number} <b>.png")
    return root


def write_weights(path: Path, arch: str, classes: list[str] = CLASSES) -> Path:
    """Write a checkpoint of a network that was never trained."""
    torch.manual_seed(0)
    network = build(arch, len(classes))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(describe_student(network.state_dict(), arch, len(classes), classes, Preprocessing.of(16, "pad")), path)
    return path


def write_run(
    folder: Path,
    top1: list[float],
    *,
    teacher: Path | None = None,
    seed: int = 0,
    planned: int | None = None,
    weights: bool = True,
    **options: Any,
) -> Path:
    """Write a run: alone, or with a teacher the terms ce and mgd; an epoch for each value of top-1."""
    folder.mkdir(parents=True)
    terms = {"ce": {"label_smoothing": 0.0}, **({"mgd": {"reducer": "amp"}} if teacher else {})}
    teachers = [{"arch": TEACHER, "resume": str(teacher), "frozen": True}] if teacher else []
    script = "main_mgd.py" if teacher else "main_base.py"
    config = {
        "command": [script, "photos", "-a", STUDENT, "--output", str(folder)],
        "folder": str(folder.parent),
        "options": {
            "arch": STUDENT, "seed": seed, "epochs": planned or len(top1), "warmup": 0, "teachers": teachers,
            "terms": terms, "lr": 0.1, **options,
        },
        "versions": {"torch": "9.9"}, "commit": "c0ffee", "machine": {"cores": 2},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    lines = [json.dumps(_record(epoch, value, bool(teacher))) for epoch, value in enumerate(top1)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if weights:
        for name in ("best.pth", "last.pth"):
            write_weights(folder / name, STUDENT)
    return folder


def _record(epoch: int, top1: float, distilled: bool) -> dict[str, float]:
    found = {
        "epoch": epoch, "train_loss": 3.0 / (epoch + 1), "train_ce": 1.0, "train_ce_weighted": 1.0, "valid_top1": top1,
        "valid_loss": 1.0, "learning_rate": 0.1, "train_seconds": 2.0,
    }  # fmt: skip
    if distilled:
        found |= {"train_mgd": 200.0, "train_mgd_weighted": 2.0, "gradient_share_ce": 0.8, "gradient_share_mgd": 0.2}
    return found


def write_evaluation(run: Path, top1: float, milliseconds: float, name: str = CLOSING) -> None:
    """Write what --evaluate measured of a run."""
    found = {
        "arch": STUDENT, "top1": top1, "parameters": 2_000_000, "megabytes": 8.0,
        "latency_ms": {"1": milliseconds, "32": 10 * milliseconds},
        "per_class": [{"name": name, "images": 4, "correct": 3}, {"name": "none", "images": 0, "correct": 0}],
    }  # fmt: skip
    (run / "evaluation.json").write_text(json.dumps({"student": found, "teacher": {**found, "arch": TEACHER}}))


def write_flow(run: Path, epoch: int = 0, sizes: tuple[tuple[int, int], ...] = ((8, 16), (16, 32), (32, 64))) -> None:
    """Write a matching of every stage: neighbouring teacher channels, which are cheap."""
    (run / "flow").mkdir(exist_ok=True)
    rng = np.random.default_rng(epoch)
    arrays: dict[str, Any] = {"epoch": epoch}
    for stage, (num_student, num_teacher) in enumerate(sizes):
        index = np.arange(num_teacher).reshape(num_student, -1).T
        cost = rng.uniform(1, 2, (num_student, num_teacher)).astype(np.float32)
        cost[np.repeat(np.arange(num_student), len(index)), index.T.ravel()] = 0.5
        arrays |= {f"cost{stage}": cost, f"index{stage}": index, f"num_teacher{stage}": num_teacher}
        arrays[f"total_cost{stage}"] = 0.5 * num_teacher
    number = len(list((run / "flow").iterdir()))
    np.savez_compressed(run / "flow" / f"{number:04d}.npz", **arrays)
